"""Bytes on disk <-> {canonical parameter name: `mx.array`}. This room knows files and names, not layers."""
