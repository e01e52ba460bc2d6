"""`midimamba serve`: a generator behind HTTP. It needs the extra `serve`; only `options` is light to import.

`server` binds a port and runs `application`, which has the endpoints. A `Sampler` samples for all requests, one after
the other, in a thread. What clients upload is read first in a process of its own, by an `UploadReader`.
"""
