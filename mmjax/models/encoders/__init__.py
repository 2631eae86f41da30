"""Encoders: one file a modality; each returns `Encoded`."""
