"""A slow cable, `delay.py CARD CARD MILLISECONDS`: passes Ethernet frames between two network cards and holds each back for that long, as
`tc netem delay`, which not every kernel has."""

import heapq
import select
import socket
import sys
import time
from contextlib import suppress
from itertools import count

ALL_FRAMES = 0x0003
PACKET, IGNORE_OUTGOING, HEADER_OF_OFFLOADS = 263, 23, 15  # SOL_PACKET, PACKET_IGNORE_OUTGOING, PACKET_VNET_HDR
LONGEST = 10 + 14 + 65536 + 4  # a frame before the card has cut it up, behind what says how to cut it
SEND_BUFFER, RECEIVE_BUFFER, BUFFER_BYTES = 32, 33, 16 << 20  # SO_SNDBUFFORCE, SO_RCVBUFFORCE: more than the system's limit


def main(first: str, second: str, milliseconds: float) -> None:
    cards = [opened(first), opened(second)]
    waiting: list[tuple[float, int, socket.socket, bytes]] = []
    order = count()
    while True:
        left = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for card in select.select(cards, [], [], left)[0]:
            other = cards[1 - cards.index(card)]
            with suppress(OSError):  # the card is down: a cut cable
                while True:
                    frame = card.recv(LONGEST)
                    heapq.heappush(waiting, (time.monotonic() + milliseconds / 1000, next(order), other, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, card, frame = heapq.heappop(waiting)
            with suppress(OSError):  # down, or its queue is full: the frame is lost
                card.send(frame)


def opened(name: str) -> socket.socket:
    card = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_FRAMES))
    card.setsockopt(PACKET, IGNORE_OUTGOING, 1)
    card.setsockopt(PACKET, HEADER_OF_OFFLOADS, 1)  # checksums and segments that the sender left to its card stay so
    for option in (SEND_BUFFER, RECEIVE_BUFFER):
        card.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    card.bind((name, ALL_FRAMES))
    card.setblocking(False)
    return card


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
