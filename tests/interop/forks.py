"""Lets hivemind fork beside its threads without freezing: imported before anything of hivemind's starts."""

import tempfile

# Once made, names of temporary files need no lock any more. A process that is forked while another thread holds that
# lock would wait for it for ever, and hivemind's processes make such files for every shared future.
tempfile.TemporaryFile().close()

# Seconds that a DHT node has to end. Past them hivemind ends it by a signal; if it holds one of the locks that all
# processes of one parent share at that moment, none of them ever answers again. Its own 3 are too few on a busy machine.
PATIENCE = 60
