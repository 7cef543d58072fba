"""Asks as a client of the 2015 system did: GROUP DATAGRAM; prints each answer with its address."""

import socket
import sys

group, datagram = sys.argv[1:]
asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asker.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 2)
asker.settimeout(1)
asker.sendto(datagram.encode("latin-1"), (group, 1337))
try:
    while True:
        answer, (address, _) = asker.recvfrom(4096)
        print(address, answer.decode(), flush=True)
except socket.timeout:
    pass
