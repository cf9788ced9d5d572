//! Whose rights the thread has while it serves a request. It is root, and may become any user for a moment.

use std::io;

use fuse_backend_rs::api::filesystem::Context;
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, capabilities, set_capabilities, set_thread_res_gid, set_thread_res_uid,
};

/// Runs `make` as the user who asks, so that what it makes is theirs. The thread's capabilities stay.
///
/// # Errors
/// EINVAL for a user who cannot be; EPERM where the thread may not become another; what `make` fails with.
pub(super) fn as_user<T>(
    ctx: &Context,
    make: impl FnOnce() -> rustix::io::Result<T>,
) -> io::Result<T> {
    if ctx.uid == u32::MAX || ctx.gid == u32::MAX {
        return Err(Errno::INVAL.into());
    }
    let (user, group) = (Uid::from_raw(ctx.uid), Gid::from_raw(ctx.gid));
    // For this thread only, unlike the C library's functions.
    let be_group = |group| set_thread_res_gid(None, Some(group), None);
    let be_user = |user| set_thread_res_uid(None, Some(user), None);
    if group != Gid::ROOT {
        be_group(group)?;
    }
    let made = if user == Uid::ROOT {
        make()
    } else {
        be_user(user).and_then(|()| {
            let made = make();
            be_user(Uid::ROOT).expect("who was root can be root again");
            made
        })
    };
    if group != Gid::ROOT {
        be_group(Gid::ROOT).expect("who was of root's group can be so again");
    }
    Ok(made?)
}

/// Runs `work` as one who may not give a file the setgid bit of a group that is not theirs, and whose writes take setuid and
/// setgid bits away.
pub(super) fn without_setgid_right<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let mut sets = capabilities(None)?;
    let all = sets.effective;
    sets.effective.remove(CapabilitySet::FSETID);
    set_capabilities(None, sets)?;
    let result = work();
    sets.effective = all;
    set_capabilities(None, sets)?;
    result
}
