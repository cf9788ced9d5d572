//! Faults of this process in memory that the guest may let disappear: a DAX window shows files of the host, and whoever
//! copies from or to a page past a file's end gets SIGBUS. System calls answer EFAULT instead, and the guest's own accesses
//! are KVM's business.
//!
//! A thread that faults in a [`Guard`]ed range finds an empty page there and goes on: whatever it was doing for the guest, it
//! does with zeroes, or for nobody. The same holds for SIGSEGV, which a guest brings about that has a device write to what it
//! has mapped to be read. A fault anywhere else is what it was before: fatal.

use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Once, OnceLock};

const PAGE: usize = 4096;

/// Most ranges at once: one for each window. Tests have some in one process.
const MAX_RANGES: usize = 64;

/// The signals, each by the place of its former action.
const SIGNALS: [libc::c_int; 2] = [libc::SIGBUS, libc::SIGSEGV];

/// A memory error of the hardware, which no page in its place makes good (siginfo's `si_code`).
const BUS_MCEERR_AR: libc::c_int = 4;
const BUS_MCEERR_AO: libc::c_int = 5;

#[derive(Debug)]
struct Entry {
    /// Zero while the place is free.
    start: AtomicUsize,
    end: AtomicUsize,
    filled: AtomicUsize,
}

/// What the handler looks at, without locks.
static RANGES: [Entry; MAX_RANGES] = [const {
    Entry {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        filled: AtomicUsize::new(0),
    }
}; MAX_RANGES];

/// What was done at the signals before.
static FORMER: OnceLock<[libc::sigaction; 2]> = OnceLock::new();

/// That faults in a range are filled, as long as it lives.
#[derive(Debug)]
pub(crate) struct Guard(&'static Entry);

impl Guard {
    /// Fills the pages of `range` where this process faults.
    ///
    /// # Safety
    /// The range is a mapping of whole pages that lives at least as long as what is returned, in which any page may be
    /// replaced by an empty one at any time.
    ///
    /// # Errors
    /// ENFILE when there are too many.
    pub(crate) unsafe fn new(range: Range<usize>) -> io::Result<Self> {
        install();
        let free = RANGES.iter().find(|entry| {
            let taken =
                entry
                    .start
                    .compare_exchange(0, range.start, Ordering::AcqRel, Ordering::Relaxed);
            taken.is_ok()
        });
        let entry = free.ok_or_else(|| io::Error::from_raw_os_error(libc::ENFILE))?;
        entry.filled.store(0, Ordering::Relaxed);
        entry.end.store(range.end, Ordering::Release);
        Ok(Self(entry))
    }

    /// How many pages were filled so far.
    pub(crate) fn filled(&self) -> usize {
        self.0.filled.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.end.store(0, Ordering::Release);
        self.0.start.store(0, Ordering::Release);
    }
}

/// Handles the signals, if it is the first time.
fn install() {
    FORMER.get_or_init(|| SIGNALS.map(|signal| set_action(signal, None)));
    static HANDLED: Once = Once::new();
    HANDLED.call_once(|| {
        // SAFETY: all zeroes are an action: the default one.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_fault as *const () as usize;
        // On the stack that Rust's threads have for such signals, since it may be their own that has overflown.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        for signal in SIGNALS {
            set_action(signal, Some(&action));
        }
    });
}

/// Sets what is done at one of the signals, if anything is given. Returns what was done before.
fn set_action(signal: libc::c_int, action: Option<&libc::sigaction>) -> libc::sigaction {
    let action = action.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: all zeroes are an action: the default one.
    let mut former: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: both are actions, or null. The handler, if it is ours, has the signature that SA_SIGINFO wants, and does only
    // what a handler may.
    let done = unsafe { libc::sigaction(signal, action, &raw mut former) };
    debug_assert_eq!(done, 0, "the signals exist and can be handled");
    former
}

/// Calls nothing but system calls, and leaves `errno` as it was.
extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands over a siginfo_t that lives as long as this call.
    let info = unsafe { &*info };
    // SAFETY: both signals have an address where the kernel has raised them; for others it is a number that is not used.
    let address = unsafe { info.si_addr() }.addr();
    let machine = signal == libc::SIGBUS && matches!(info.si_code, BUS_MCEERR_AR | BUS_MCEERR_AO);
    // SAFETY: returns this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the pointer is valid in this thread.
    let before = unsafe { *errno };
    if info.si_code <= 0 || machine || !fill(address) {
        be_former(signal);
    }
    // SAFETY: as above.
    unsafe { *errno = before };
}

/// Puts an empty page where `address` is, if that is in a range. False if it is not, or cannot be.
fn fill(address: usize) -> bool {
    let within = |entry: &&Entry| {
        let start = entry.start.load(Ordering::Acquire);
        start != 0 && (start..entry.end.load(Ordering::Acquire)).contains(&address)
    };
    let Some(entry) = RANGES.iter().find(within) else {
        return false;
    };
    let page = ptr::without_provenance_mut::<libc::c_void>(address & !(PAGE - 1));
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the page lies in a guarded range, where any page may be replaced so (`Guard::new`).
    let mapped = unsafe { libc::mmap(page, PAGE, protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return false;
    }
    entry.filled.fetch_add(1, Ordering::AcqRel);
    true
}

/// Handles the signal as before, from when the fault repeats itself on.
fn be_former(signal: libc::c_int) {
    let place = SIGNALS.iter().position(|other| *other == signal);
    let former = FORMER.get().zip(place);
    set_action(signal, former.and_then(|(all, place)| all.get(place)));
}
