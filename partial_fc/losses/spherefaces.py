"""The SphereFace family and plain softmax."""
