"""Numbers that several rooms must agree on."""

# They stand in token sequences for something other than an entry of the vocabulary.
IMAGE_ID = -200
IGNORE = -100

# Mean and spread of red, green and blue, by which CLIP's pictures are normalised.
Triple = tuple[float, float, float]
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
