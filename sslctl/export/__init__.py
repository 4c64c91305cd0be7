"""Backbones as files of other libraries."""
