"""What a resumed run needs: its state, how it is saved, and which save is the latest."""
