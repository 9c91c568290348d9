//! Credit-based flow control, per stream.
//!
//! A stream starts with [`STREAM_WINDOW`] bytes of credit. The receiver grants more as its own reader
//! takes bytes away, so at most a window's worth is ever held for a stream.

use thiserror::Error;

/// How many bytes may be on their way on a stream. It covers the time that a grant takes to come back
/// on the slowest channel (about a millisecond under TCG) at some hundred megabytes a second.
pub const STREAM_WINDOW: u32 = 1024 * 1024;

/// Grants are collected until they are worth a frame.
const GRANT_AT: u32 = STREAM_WINDOW / 4;

/// A peer that broke the rules of flow control.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FlowError {
    /// More data than was granted.
    #[error("{got} bytes came on a stream with {room} bytes of credit")]
    Overrun {
        /// Bytes received.
        got: usize,
        /// Bytes that had been granted.
        room: u32,
    },
    /// Credit beyond what a counter holds.
    #[error("a grant of {0} bytes is more than a stream can have")]
    Grant(u32),
}

/// The sender's side: how much may be sent now.
#[derive(Debug, Clone)]
pub struct SendWindow {
    credit: u32,
}

impl Default for SendWindow {
    fn default() -> Self {
        Self { credit: STREAM_WINDOW }
    }
}

impl SendWindow {
    /// Bytes that may be sent now.
    pub fn available(&self) -> usize {
        self.credit as usize
    }

    /// Notes that `count` bytes were sent. The caller has asked [`available`](Self::available).
    ///
    /// # Panics
    /// When more is sent than is available.
    pub fn sent(&mut self, count: usize) {
        assert!(count <= self.credit as usize, "sent beyond the window");
        self.credit -= count as u32;
    }

    /// Takes in a grant from the receiver.
    ///
    /// # Errors
    /// When the receiver grants more than a whole window.
    pub fn granted(&mut self, bytes: u32) -> Result<(), FlowError> {
        match self.credit.checked_add(bytes) {
            Some(credit) if credit <= STREAM_WINDOW => {
                self.credit = credit;
                Ok(())
            }
            _ => Err(FlowError::Grant(bytes)),
        }
    }
}

/// The receiver's side: how much may still come, and when to grant more.
#[derive(Debug, Clone)]
pub struct ReceiveWindow {
    room: u32,
    taken: u32,
}

impl Default for ReceiveWindow {
    fn default() -> Self {
        Self { room: STREAM_WINDOW, taken: 0 }
    }
}

impl ReceiveWindow {
    /// Notes data that came.
    ///
    /// # Errors
    /// When it is more than was granted.
    pub fn received(&mut self, count: usize) -> Result<(), FlowError> {
        if count > self.room as usize {
            return Err(FlowError::Overrun { got: count, room: self.room });
        }
        self.room -= count as u32;
        Ok(())
    }

    /// Notes that `count` of the received bytes have been passed on. Returns the bytes to grant now,
    /// when there are enough of them to be worth a frame.
    pub fn consumed(&mut self, count: usize) -> Option<u32> {
        self.taken += count as u32;
        if self.taken < GRANT_AT {
            return None;
        }
        let grant = std::mem::take(&mut self.taken);
        self.room += grant;
        Some(grant)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever the sizes, the sender never starves for good and the receiver is never overrun.
        #[test]
        fn a_transfer_always_completes(total in 0usize..8_000_000, chunk in 1usize..400_000, reads in 1usize..300_000) {
            let (mut send, mut receive) = (SendWindow::default(), ReceiveWindow::default());
            let (mut left, mut held, mut done) = (total, 0usize, 0usize);
            while done < total {
                let now = left.min(chunk).min(send.available());
                send.sent(now);
                receive.received(now).unwrap();
                left -= now;
                held += now;
                prop_assert!(held <= STREAM_WINDOW as usize);
                let taken = held.min(reads);
                held -= taken;
                done += taken;
                if let Some(grant) = receive.consumed(taken) {
                    send.granted(grant).unwrap();
                }
            }
        }
    }

    #[test]
    fn rules_are_enforced() {
        let mut receive = ReceiveWindow::default();
        receive.received(STREAM_WINDOW as usize).unwrap();
        assert_eq!(receive.received(1), Err(FlowError::Overrun { got: 1, room: 0 }));
        let mut send = SendWindow::default();
        assert_eq!(send.granted(1), Err(FlowError::Grant(1)));
        assert_eq!(send.granted(u32::MAX), Err(FlowError::Grant(u32::MAX)));
        send.sent(10);
        assert_eq!(send.granted(10), Ok(()));
    }
}
