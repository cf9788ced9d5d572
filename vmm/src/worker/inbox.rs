//! What other threads have for the main thread: a channel that epoll can wait for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryIter, channel};

use rustix::event::{EventfdFlags, eventfd};

/// The main thread's end.
#[derive(Debug)]
pub(super) struct Inbox<T> {
    items: Receiver<T>,
    wake: Arc<OwnedFd>,
}

/// The end of the other threads.
#[derive(Debug)]
pub(super) struct Outlet<T> {
    items: Sender<T>,
    wake: Arc<OwnedFd>,
}

impl<T> Clone for Outlet<T> {
    fn clone(&self) -> Self {
        Self {
            items: self.items.clone(),
            wake: Arc::clone(&self.wake),
        }
    }
}

/// Both ends.
pub(super) fn inbox<T>() -> io::Result<(Outlet<T>, Inbox<T>)> {
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, items) = channel();
    let outlet = Outlet {
        items: sender,
        wake: Arc::clone(&wake),
    };
    Ok((outlet, Inbox { items, wake }))
}

impl<T> Outlet<T> {
    /// Hands `item` to the main thread; to nobody, if that has ended.
    pub(super) fn send(&self, item: T) {
        if self.items.send(item).is_ok() {
            // It can only fail because the counter is full, and then the main thread is awake anyway.
            let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        }
    }
}

impl<T> Inbox<T> {
    /// Takes what is there. What comes later wakes again.
    pub(super) fn take(&self) -> TryIter<'_, T> {
        // Before the items, so that none can slip between: at worst the next turn finds nothing.
        let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
        self.items.try_iter()
    }
}

impl<T> AsFd for Inbox<T> {
    /// Readable while something may be there.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn is_readable(inbox: &Inbox<u8>) -> bool {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut [PollFd::new(inbox, PollFlags::IN)], Some(&now)).unwrap() == 1
    }

    #[test]
    fn items_wake_and_come_in_order() {
        let (outlet, inbox) = inbox().unwrap();
        assert!(!is_readable(&inbox));
        let other = outlet.clone();
        std::thread::spawn(move || {
            other.send(1);
            other.send(2);
        })
        .join()
        .unwrap();
        assert!(is_readable(&inbox));
        assert_eq!(inbox.take().collect::<Vec<_>>(), [1, 2]);
        assert!(!is_readable(&inbox));
    }

    #[test]
    fn item_for_nobody_is_dropped() {
        let (outlet, inbox) = inbox().unwrap();
        drop(inbox);
        outlet.send(1);
    }
}
