"""Facial landmarks with the local-global context network (Merget, Rock, Rigoll, CVPR 2018), made fast."""
