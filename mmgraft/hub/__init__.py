"""What leaves the machine: the model card and the push to the Hub, exports, imports."""
