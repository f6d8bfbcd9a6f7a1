"""The roll call: who takes part in a run, whether all agree, and why it ended.

JAX's coordination ends a run of which a process is missing or has died with abort() and a C++
stack that names nobody. So the processes first meet here, and stay in touch until the end:

    process 1 ---+
    process 2 ---+--- hub, in process 0          lines of JSON over TCP, one port for all
    process 3 ---+

In every process one daemon thread runs an asyncio loop, and with it all that is here. The hub
serves its connections from that one thread: 1024 of them are 1024 sockets in one epoll, not 1024
threads that fight over the GIL, and its state needs no locks. Like JAX's own coordinator it
believes who speaks its language: the network must be one's own.
"""
