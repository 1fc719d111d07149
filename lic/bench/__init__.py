"""``lic bench``: rate, distortion and speed of a model on real files, beside other codecs."""
