"""`engine: trl`: a stage trained by TRL's own trainer, so that anyone can check align against it.

What goes in is align's: token ids and masks, the order of the examples, initial weights, the optimizer's settings. What
happens to it is TRL's: forward pass, loss, reduction, optimizer step. What comes out is an artifact like any other.
"""
