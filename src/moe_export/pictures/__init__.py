"""Looking at graphs: one as a picture, two side by side, or one in Netron."""
