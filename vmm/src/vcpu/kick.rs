//! How a vCPU's thread is called out of the guest.
//!
//! KVM_RUN returns when a signal arrives. Alone that is a race: a signal that comes after the thread has looked for orders
//! and before it has entered the guest would be lost. So the signal's handler, which runs on the vCPU's own thread, also
//! sets `immediate_exit` in the page that KVM shares with it. Either the signal interrupts KVM_RUN, or the next KVM_RUN
//! sees the flag and returns at once. The thread clears the flag, and looks for orders afterwards.

use std::cell::Cell;
use std::ptr;
use std::sync::Once;
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

thread_local! {
    /// `immediate_exit` of the vCPU that runs on this thread. Constant to make and without a destructor, so that the
    /// handler may use it at any moment.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn handle_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Kickable` set it to a byte that stays mapped until it is set back to null on this same thread.
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the handler, once in the process.
pub(super) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        register_signal_handler(SIGRTMIN(), handle_kick)
            .expect("a handler can be set for a real-time signal");
    });
}

/// Calls the thread out of the guest, or out of the next attempt to enter it.
pub(super) fn kick(thread: &JoinHandle<()>) {
    // It fails only for a thread that has ended, which needs no kick.
    let _ = thread.kill(SIGRTMIN());
}

/// While it lives, a kick of this thread sets `immediate_exit` in one vCPU's shared page.
#[derive(Debug)]
pub(super) struct Kickable;

impl Kickable {
    /// # Safety
    /// `run` must stay mapped until the result is dropped, on this same thread.
    pub(super) unsafe fn new(run: *mut kvm_run) -> Self {
        // SAFETY: the caller passes a valid pointer; this only computes the address of a field.
        IMMEDIATE_EXIT.set(unsafe { &raw mut (*run).immediate_exit });
        Self
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}
