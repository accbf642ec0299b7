"""Evaluation: does a model answer long prompts with a sparse method as it does with all keys?

    minference eval MODEL --tasks niah --methods dense,minference --lengths 4k,8k -o out/eval

`tasks` draws prompts, `plan` says which, `scoring` asks the model, `records` keeps what it said,
`statistics`, `tables` and `html` read that.
"""
