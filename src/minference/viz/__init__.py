"""Pictures: functions from data to a matplotlib figure, one file a picture."""
