"""Lets hivemind fork beside its threads without freezing: imported before anything of hivemind's starts."""

import tempfile

# Once made, names of temporary files need no lock any more. A process that is forked while another thread holds that
# lock would wait for it for ever, and hivemind's processes make such files for every shared future.
tempfile.TemporaryFile().close()

# How long, in seconds, hivemind's DHT nodes wait on a busy machine; its own patience is 3, 3 and 15.
PATIENCE = {
    # For a node to end. Past them hivemind ends it by a signal; if it holds one of the locks that all processes of one
    # parent share at that moment, none of them ever answers again.
    "shutdown_timeout": 60,
    # For an answer. Past them it asks that peer no more for a while; who knows only that one then finds nothing.
    "wait_timeout": 15,
    # For its daemon to start.
    "startup_timeout": 60,
}
