"""Runs on class-conditional networks: forget classes of images."""
