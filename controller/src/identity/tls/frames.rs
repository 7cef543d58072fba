//! Counters of the HTTP/2 frames that a peer makes us handle. h2 bounds the memory, but answers some floods without a
//! limit. Here frames are counted as they pass, and a connection that floods is closed.

use std::time::Duration;

use tokio::time::Instant;

/// Time over which frames are counted.
const WINDOW: Duration = Duration::from_secs(10);
/// Streams that may end by a reset in the window, by either side: a console that closes its watches has dozens. A rapid
/// reset (CVE-2023-44487), and streams opened beyond the announced limit, have thousands.
pub(super) const MAX_RESETS: u32 = 500;
/// Frames in the window that carry nothing: SETTINGS, PING, PRIORITY, empty DATA and CONTINUATION, unknown ones
/// (CVE-2019-9512, 9515, 9518). Each DATA frame that we send allows one more, because some clients measure with a PING
/// for each.
pub(super) const MAX_HOLLOW: u32 = 2000;
/// Length of the client's preface before its first frame (RFC 9113, section 3.4).
const PREFACE: usize = 24;
/// Length of a frame's head: length, type, flags and stream (RFC 9113, section 4.1).
const HEAD: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
/// The flag of SETTINGS and PING that makes them an answer; on DATA it ends the stream.
const ACK: u8 = 1;

/// The kind of a flood: frames that no client has reason to send in such numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flood(pub(super) &'static str);

/// The head of a frame.
#[derive(Debug, Clone, Copy)]
struct Frame {
    length: u32,
    kind: u8,
    flags: u8,
}

/// Finds the heads of frames in bytes that come in any pieces.
#[derive(Debug, Default)]
struct Lane {
    /// Bytes until the next head: the preface at first, then payloads.
    skip: usize,
    head: [u8; HEAD],
    have: usize,
}

impl Lane {
    fn between_frames(&self) -> bool {
        self.skip == 0 && self.have == 0
    }

    fn pass(&mut self, mut bytes: &[u8], mut frame: impl FnMut(Frame)) {
        while !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = bytes.get(skipped..).unwrap_or_default();
            let wanted = HEAD.saturating_sub(self.have).min(bytes.len());
            let (part, rest) = bytes.split_at_checked(wanted).unwrap_or_default();
            if let Some(place) = self.head.get_mut(self.have..self.have + wanted) {
                place.copy_from_slice(part);
            }
            self.have += wanted;
            bytes = rest;
            if self.have == HEAD {
                let [a, b, c, kind, flags, ..] = self.head;
                let length = u32::from_be_bytes([0, a, b, c]);
                self.have = 0;
                self.skip = usize::try_from(length).unwrap_or(usize::MAX);
                frame(Frame { length, kind, flags });
            }
        }
    }
}

/// The frames of one connection, both ways.
#[derive(Debug)]
pub(super) struct Frames {
    received: Lane,
    sent: Lane,
    begun: bool,
    window: Instant,
    resets: u32,
    hollow: u32,
}

impl Frames {
    pub(super) fn new(now: Instant) -> Self {
        let received = Lane { skip: PREFACE, ..Lane::default() };
        Self { received, sent: Lane::default(), begun: false, window: now, resets: 0, hollow: 0 }
    }

    /// True if the peer has sent a frame.
    pub(super) fn begun(&self) -> bool {
        self.begun
    }

    /// True if the bytes sent so far end with a whole frame.
    pub(super) fn may_send(&self) -> bool {
        self.sent.between_frames()
    }

    /// Counts bytes that the peer sent.
    pub(super) fn received(&mut self, bytes: &[u8], now: Instant) -> Result<(), Flood> {
        // A fixed window instead of a sliding one: two counters for a connection, and at most twice the limit.
        if now.duration_since(self.window) >= WINDOW {
            (self.window, self.resets, self.hollow) = (now, 0, 0);
        }
        let (mut resets, mut hollow, mut begun) = (0_u32, 0_u32, self.begun);
        self.received.pass(bytes, |frame| {
            begun = true;
            match frame.kind {
                RST_STREAM => resets = resets.saturating_add(1),
                // Answers to our own SETTINGS and PING are not the peer's doing.
                SETTINGS | PING if frame.flags & ACK == 0 => hollow = hollow.saturating_add(1),
                DATA if frame.length == 0 && frame.flags & ACK == 0 => hollow = hollow.saturating_add(1),
                CONTINUATION if frame.length == 0 => hollow = hollow.saturating_add(1),
                DATA | HEADERS | SETTINGS | PING | GOAWAY | WINDOW_UPDATE | CONTINUATION | PUSH_PROMISE => {}
                // An unknown type must be ignored (RFC 9113, section 5.5), which makes it free to send.
                _ => hollow = hollow.saturating_add(1),
            }
        });
        self.begun = begun;
        self.resets = self.resets.saturating_add(resets);
        self.hollow = self.hollow.saturating_add(hollow);
        self.judge()
    }

    /// Counts bytes that we sent.
    pub(super) fn sent(&mut self, bytes: &[u8]) -> Result<(), Flood> {
        let (mut resets, mut data) = (0_u32, 0_u32);
        self.sent.pass(bytes, |frame| match frame.kind {
            // Streams that we reset count like the peer's: opening streams beyond the limit forces us to.
            RST_STREAM => resets = resets.saturating_add(1),
            DATA => data = data.saturating_add(1),
            _ => {}
        });
        self.resets = self.resets.saturating_add(resets);
        // Some clients send a PING for each DATA frame to measure the bandwidth.
        self.hollow = self.hollow.saturating_sub(data);
        self.judge()
    }

    fn judge(&self) -> Result<(), Flood> {
        if self.resets > MAX_RESETS {
            return Err(Flood("streams that end by a reset"));
        }
        if self.hollow > MAX_HOLLOW {
            return Err(Flood("frames that carry nothing"));
        }
        Ok(())
    }
}

/// GOAWAY for all streams, ENHANCE_YOUR_CALM (RFC 9113, sections 6.8 and 7).
pub(super) const ENHANCE_YOUR_CALM: [u8; 17] = [0, 0, 8, GOAWAY, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11];

#[cfg(test)]
mod tests {
    use super::{DATA, Flood, Frames, HEADERS, MAX_HOLLOW, MAX_RESETS, PING, RST_STREAM, WINDOW};
    use tokio::time::Instant;

    fn frame(kind: u8, flags: u8, length: usize) -> Vec<u8> {
        let mut bytes = u32::try_from(length).unwrap().to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags, 0, 0, 0, 1]);
        bytes.resize(9 + length, kind);
        bytes
    }

    fn begun(now: Instant) -> Frames {
        let mut frames = Frames::new(now);
        assert_eq!(frames.received(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", now), Ok(()));
        assert!(!frames.begun());
        frames
    }

    #[test]
    fn frames_are_found_in_whatever_pieces_they_come() {
        let now = Instant::now();
        for piece in [1, 2, 7, 9, 10, 100_000] {
            let mut frames = begun(now);
            let mut bytes = Vec::new();
            for _ in 0..MAX_RESETS {
                bytes.extend(frame(HEADERS, 4, 33));
                bytes.extend(frame(RST_STREAM, 0, 4));
                bytes.extend(frame(DATA, 0, 3000));
            }
            bytes.chunks(piece).for_each(|part| assert_eq!(frames.received(part, now), Ok(()), "{piece}"));
            assert!(frames.begun());
            assert!(matches!(frames.received(&frame(RST_STREAM, 0, 4), now), Err(Flood(_))), "{piece}");
        }
    }

    #[test]
    fn a_window_later_counting_begins_anew() {
        let now = Instant::now();
        let mut frames = begun(now);
        for _ in 0..MAX_RESETS {
            assert_eq!(frames.received(&frame(RST_STREAM, 0, 4), now), Ok(()));
        }
        assert_eq!(frames.received(&frame(RST_STREAM, 0, 4), now + WINDOW), Ok(()));
    }

    #[test]
    fn streams_that_we_refuse_count_as_those_that_the_peer_resets() {
        let mut frames = begun(Instant::now());
        for _ in 0..MAX_RESETS {
            assert_eq!(frames.sent(&frame(RST_STREAM, 0, 4)), Ok(()));
        }
        assert!(frames.sent(&frame(RST_STREAM, 0, 4)).is_err());
    }

    #[test]
    fn a_ping_for_each_frame_of_data_is_no_flood_and_answers_are_none() {
        let now = Instant::now();
        let mut frames = begun(now);
        for _ in 0..3 * MAX_HOLLOW {
            frames.sent(&frame(DATA, 0, 100)).unwrap();
            frames.received(&frame(PING, 0, 8), now).unwrap();
            frames.received(&frame(PING, 1, 8), now).unwrap();
        }
        for _ in 1..MAX_HOLLOW {
            frames.received(&frame(PING, 0, 8), now).unwrap();
        }
        frames.sent(&frame(HEADERS, 4, 5)[..3]).unwrap();
        assert!(!frames.may_send());
        assert!((0..2).any(|_| frames.received(&frame(DATA, 0, 0), now).is_err()));
    }
}
