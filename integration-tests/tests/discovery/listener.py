"""Hears what is asked of both groups of MarcoPolo, and answers nothing: ADDRESS; prints seconds, group, hops, datagram."""

import select
import socket
import struct
import sys
import time

# linux/in.h; Python names it since 3.14 only.
IP_RECVTTL = 12

listeners = {}
for group in ["224.0.0.112", "224.0.0.113"]:
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.bind((group, 1337))
    membership = socket.inet_aton(group) + socket.inet_aton(sys.argv[1])
    listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    listener.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
    listeners[listener] = group
print("ready", flush=True)
while True:
    for listener in select.select(list(listeners), [], [])[0]:
        datagram, further, _, _ = listener.recvmsg(4096, 64)
        (hops,) = [struct.unpack("i", data)[0] for level, kind, data in further if kind == socket.IP_TTL]
        print(time.monotonic(), listeners[listener], hops, datagram.decode(), flush=True)
