"""The two numbers that stand in token sequences for something other than a vocabulary entry."""

IMAGE_ID = -200
IGNORE = -100
