"""Mamba language models for MIDI."""
