"""Asks by mDNS for controllers, as any browser of services does: ADDRESS; prints the port and the texts of the first
answer."""

import socket
import struct
import sys

GROUP = ("224.0.0.251", 5353)
SERVICE = b"\x10_marco-bootstrap\x04_tcp\x05local\0"


def after_name(packet, at):
    while packet[at] and packet[at] < 0xC0:
        at += 1 + packet[at]
    return at + (2 if packet[at] else 1)


def records(packet):
    _, _, questions, *counts = struct.unpack(">HHHHHH", packet[:12])
    at = 12
    for _ in range(questions):
        at = after_name(packet, at) + 4
    for _ in range(sum(counts)):
        at = after_name(packet, at)
        kind, _, _, length = struct.unpack(">HHIH", packet[at : at + 10])
        yield kind, packet[at + 10 : at + 10 + length]
        at += 10 + length


browser = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
browser.bind(("", 5353))
membership = socket.inet_aton(GROUP[0]) + socket.inet_aton(sys.argv[1])
browser.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
browser.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
browser.settimeout(5)
browser.sendto(struct.pack(">HHHHHH", 0, 0, 1, 0, 0, 0) + SERVICE + struct.pack(">HH", 12, 1), GROUP)
found = {}
while not {16, 33} <= found.keys():
    found.update(records(browser.recv(9000)))
print(struct.unpack(">H", found[33][4:6])[0])
texts = found[16]
while texts:
    print(texts[1 : 1 + texts[0]].decode())
    texts = texts[1 + texts[0] :]
