"""Words, numbers, UUIDs and names, each in a training or a held-out half that never meet.

A CRC of the string decides the half, so it is the same on every machine and Python version.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from random import Random

from minference.eval.tasks.sample import Split

_ADJECTIVES = """
able acid aged airy amber ample arid ashen autumn azure bald bare basic bitter black bland blue
blunt bold brave brief bright brisk broad broken bronze brown busy calm careful cheap chief civil
clean clear clever close cloudy clumsy coarse cold common cool copper coral cosmic crimson crisp
cruel curly curved damp dapper daring dark dear deep dense dim distant dizzy double drab dry dull
dusty eager early east easy elder empty equal even exact faded faint fair famous fancy fast fatal
feral fierce final fine firm flat fluffy foggy formal frail free fresh frosty frozen full funny
gentle giant giddy glad gloomy golden good grand grave gray great green grim guilty handy happy
hardy harsh hasty heavy hidden high hollow honest humble hungry icy idle inner ivory jade jolly
keen kind large late lazy lean level light little lively local lone long loose lost loud loyal
lucky lunar mad magic main marble mellow merry mild mint misty modest moist muddy mute narrow near
neat new nimble noble noisy north odd old olive open orange outer pale past perfect pink plain
plump polar polite prime private proud pure purple quick quiet rapid rare raw ready red regal rich
ripe rough round royal rude rusty sacred safe salty sandy scarlet secret shady shallow sharp shiny
short shy silent silky silver simple sleepy slim slow small smooth snowy soft solar solid sour
south spare spicy stable stale steady steep stern stiff still stormy strange strict strong sturdy
sudden sunny super sweet swift tall tame tart tender thick thin tidy tiny tired tough tropic true
urban usual vague vast velvet violet vital vivid warm wary weak west wet white wide wild windy
wise witty wooden yellow young zesty
"""

_NOUNS = """
acorn actor alley anchor anvil apple apron arch arrow attic badge badger banjo bank barn barrel
basin basket beach beacon beam bean bear beaver bell bench berry bird biscuit blade blanket boat
bolt bone book boot bottle bow bowl box branch bread brick bridge broom brush bucket button cabin
cable cactus camel camera candle canoe canyon cape carpet carrot castle cave cedar cellar chain
chair chalk cherry chess chest chimney circle citrus clam clay cliff clock cloud clover coast coat
cobra coin comet compass cone copy corner cotton cradle crane crate crayon creek cricket crow crown
crystal cup curtain cushion dagger daisy dance deer desert desk diamond dish dock dolphin donkey
door dragon drawer dream drum duck eagle easel echo elbow elm engine falcon farm feather fence fern
ferry fiddle field finch flag flame flask flute forest fork fossil fountain fox frog garden garlic
gate geyser ginger glacier glass glove goat goose grape grass grove guitar hammer harbor harp hat
hawk hazel helmet heron hill honey hook horn horse hotel house island ivy jacket jaguar jar jewel
jungle kettle key kite kitten knife knot ladder lake lamp lantern leaf lemon letter lily lion lizard
locket log lotus lynx magnet mango map maple market mask meadow medal melon mirror mitten monkey
moon moose moth mountain mouse museum nest night nut oak oasis oboe ocean olive onion orchid otter
owl oyster paddle palace panda paper parrot path peach pearl pebble pelican pencil pepper piano
pillow pine pirate planet plank plate plum pocket pond pony poppy pot prism puddle puppet puzzle
quail quartz quilt rabbit raft rail rain raven reef ribbon rice ring river road robin rocket roof
root rope rose saddle sail salmon sand scarf school sea seal shadow shark shelf shell ship shoe
shovel sky sled snail snow soap sofa spark sparrow spider spoon spruce squid stable star statue
stone stove straw street sugar summit swan sword table tablet teapot temple tent thistle thread
throne ticket tiger timber toast tower train tray tree trumpet tulip tunnel turtle valley vase
vessel village vine violin wagon walnut wave whale wheat wheel whistle willow window wing winter
wolf wood yacht zebra
"""

_ONSETS = "b br c ch cl d dr f fl g gr h j k l m n p pl qu r s sh st t th tr v w z"
_VOWELS = "a e i o u ai ea ou"
_CODAS = "b ck d g l ll m n nd ng p r rk s st t x"
_UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def is_held_out(text: str, share: int = 8) -> bool:
    """Whether a string belongs to the held-out half: one in `share` does, for good."""
    return zlib.crc32(b"minference:" + text.encode()) % share == 0


@cache
def word_lists(*, held_out: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Adjectives and nouns of one half; one word in three is held out."""
    adjectives, nouns = (
        tuple(word for word in words.split() if is_held_out(word, 3) == held_out)
        for words in (_ADJECTIVES, _NOUNS)
    )
    return adjectives, nouns


@dataclass
class Vocabulary:
    """Draws strings of one half and never the same one twice for one sample."""

    rng: Random
    split: Split
    used: set[str] = field(default_factory=set)

    @property
    def held_out(self) -> bool:
        """The evaluation splits share the held-out half and differ in seeds."""
        return self.split != "train"

    def key(self) -> str:
        """An adjective and a noun, "brave-otter", or two coined words if those run out."""
        adjectives, nouns = word_lists(held_out=self.held_out)
        for _ in range(20):
            key = f"{self.rng.choice(adjectives)}-{self.rng.choice(nouns)}"
            if key not in self.used:
                self.used.add(key)
                return key
        return f"{self.word()}-{self.word()}"

    def word(self) -> str:
        """A coined word of two syllables, "thoulbrand"."""
        return self._fresh(lambda: self._syllable() + self._syllable())

    def number(self, digits: int = 7) -> str:
        """A number of so many digits without a leading zero."""
        low = 10 ** (digits - 1)
        return self._fresh(lambda: str(self.rng.randrange(low, 10 * low)))

    def uuid(self) -> str:
        """A random UUID in the usual 8-4-4-4-12 form."""
        return self._fresh(self._draw_uuid)

    def name(self, letters: int = 5) -> str:
        """A variable's name in capitals."""
        return self._fresh(lambda: "".join(self.rng.choices(_UPPER, k=letters)))

    def code(self, letters: int = 6) -> str:
        """A coded word of lower-case letters."""
        return self._fresh(lambda: "".join(self.rng.choices(_UPPER, k=letters)).lower())

    def _syllable(self) -> str:
        choice = self.rng.choice
        return choice(_ONSETS.split()) + choice(_VOWELS.split()) + choice(_CODAS.split())

    def _draw_uuid(self) -> str:
        raw = f"{self.rng.getrandbits(128):032x}"
        return f"{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}"

    def _fresh(self, draw: Callable[[], str]) -> str:
        while True:
            text = draw()
            if text not in self.used and is_held_out(text) == self.held_out:
                self.used.add(text)
                return text
