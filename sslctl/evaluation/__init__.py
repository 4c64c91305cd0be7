"""Measuring frozen features: extracted once, probed by nearest neighbours and linear classifiers."""
