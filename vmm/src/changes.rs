//! What others have changed in a shared folder, on its way from the thread that watches it to the shim.
//!
//! It is bounded, and nobody waits for it: the shim is told once that there is something, and takes it when it can. What
//! does not fit is lost, and said to be.

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::control::{ChangeKind, FileChange, MAX_MESSAGE_LEN};

/// Most changes that wait to be taken: as many as Linux keeps for who reads an inotify descriptor too slowly.
const MAX_WAITING: usize = 16 * 1024;

/// Most changes that are taken at once.
const MAX_TAKEN: usize = 256;

/// Most bytes of paths that are taken at once. A byte may take four in a message, and a change some hundred besides.
const MAX_TAKEN_BYTES: usize = 8 * 1024;

const _: () = assert!(4 * MAX_TAKEN_BYTES + 100 * MAX_TAKEN < MAX_MESSAGE_LEN);

/// Called when there is something to be taken, on the thread that watches.
type Tell = Box<dyn Fn() + Send>;

/// The changes that nobody has taken yet.
#[derive(Default)]
pub(crate) struct Changes(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    changes: VecDeque<FileChange>,
    /// Those of the last ones that say the same if they come again.
    repeatable: HashSet<FileChange>,
    /// Somebody has been told, and has not taken all.
    told: bool,
    tell: Option<Tell>,
}

impl Waiting {
    fn tell(&mut self) {
        if !self.told
            && let Some(tell) = &self.tell
        {
            tell();
            self.told = true;
        }
    }
}

impl fmt::Debug for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Changes")
            .field("waiting", &self.lock().changes.len())
            .finish_non_exhaustive()
    }
}

impl Changes {
    /// From now on, `tell` is called whenever there is something to take, until all is taken.
    pub(crate) fn tell(&self, tell: impl Fn() + Send + 'static) {
        self.lock().tell = Some(Box::new(tell));
    }

    /// Adds a change, unless the same waits already and nothing has happened since that makes a difference.
    ///
    /// Returns whether there was room for it.
    #[must_use]
    pub(crate) fn add(&self, change: FileChange) -> bool {
        let mut waiting = self.lock();
        if waiting.repeatable.contains(&change) {
            return true;
        }
        if waiting.changes.len() >= MAX_WAITING {
            return false;
        }
        if is_repeatable(change.kind) {
            waiting.repeatable.insert(change.clone());
        } else {
            waiting.repeatable.clear();
        }
        waiting.changes.push_back(change);
        waiting.tell();
        true
    }

    /// Adds a change although there is no room, for those of which there are only so many. Returns whether it did not wait
    /// already.
    pub(crate) fn add_at_last(&self, change: FileChange) -> bool {
        let mut waiting = self.lock();
        let is_new = waiting.repeatable.insert(change.clone());
        if is_new {
            waiting.changes.push_back(change);
            waiting.tell();
        }
        is_new
    }

    /// Takes the first changes, and tells whether more are there.
    pub(crate) fn take(&self) -> (Vec<FileChange>, bool) {
        let mut waiting = self.lock();
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while taken.len() < MAX_TAKEN
            && let Some(next) = waiting.changes.front()
        {
            bytes += next.path.len() + next.to.len();
            if bytes > MAX_TAKEN_BYTES && !taken.is_empty() {
                break;
            }
            taken.extend(waiting.changes.pop_front());
        }
        for change in &taken {
            waiting.repeatable.remove(change);
        }
        waiting.told = !waiting.changes.is_empty();
        (taken, waiting.told)
    }

    /// How many wait.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.lock().changes.len()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether two of these in a row, of the same file, say no more than one.
fn is_repeatable(kind: ChangeKind) -> bool {
    match kind {
        ChangeKind::Modified | ChangeKind::Written | ChangeKind::Attributes => true,
        ChangeKind::Created | ChangeKind::Gone | ChangeKind::Moved => false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn change(kind: ChangeKind, path: &str) -> FileChange {
        FileChange {
            kind,
            path: path.into(),
            to: Vec::new(),
            file_type: libc::S_IFREG,
        }
    }

    #[test]
    fn shim_is_told_once_until_it_has_taken_all() {
        let changes = Changes::default();
        let told = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&told);
        changes.tell(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        for index in 0..=MAX_TAKEN {
            assert!(changes.add(change(ChangeKind::Created, &index.to_string())));
        }
        assert_eq!(told.load(Ordering::Relaxed), 1);
        let (taken, more) = changes.take();
        assert_eq!((taken.len(), more), (MAX_TAKEN, true));
        assert!(changes.add(change(ChangeKind::Gone, "a")));
        assert_eq!(told.load(Ordering::Relaxed), 1);
        let (taken, more) = changes.take();
        assert_eq!((taken.len(), more), (2, false));
        assert!(changes.add(change(ChangeKind::Gone, "a")));
        assert_eq!(told.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn repeated_writes_are_one_change() {
        let changes = Changes::default();
        for _ in 0..10_000 {
            assert!(changes.add(change(ChangeKind::Modified, "a")));
            assert!(changes.add(change(ChangeKind::Modified, "b")));
        }
        let (taken, _) = changes.take();
        assert_eq!(taken.len(), 2);
        assert!(changes.add(change(ChangeKind::Modified, "a")));
        assert_eq!(changes.take().0.len(), 1);
    }

    #[test]
    fn write_to_a_new_file_of_the_same_name_is_another() {
        let changes = Changes::default();
        let all = [
            ChangeKind::Modified,
            ChangeKind::Gone,
            ChangeKind::Created,
            ChangeKind::Modified,
        ];
        for kind in all {
            assert!(changes.add(change(kind, "a")));
        }
        let kinds: Vec<_> = changes.take().0.iter().map(|change| change.kind).collect();
        assert_eq!(kinds, all);
    }

    #[test]
    fn what_nobody_takes_is_bounded() {
        let changes = Changes::default();
        for index in 0..MAX_WAITING {
            assert!(changes.add(change(ChangeKind::Created, &index.to_string())));
        }
        assert!(!changes.add(change(ChangeKind::Created, "one more")));
        let _ = changes.take();
        assert!(changes.add(change(ChangeKind::Created, "one more")));
    }

    #[test]
    fn longest_paths_fit_into_a_message() {
        let changes = Changes::default();
        let path = "\u{ff}".repeat(2000);
        let long = FileChange {
            kind: ChangeKind::Moved,
            path: path.clone().into(),
            to: path.into(),
            file_type: u32::MAX,
        };
        for _ in 0..3 {
            assert!(changes.add(long.clone()));
        }
        let (taken, more) = changes.take();
        assert_eq!((taken.len(), more), (1, true));
        assert!(serde_json::to_vec(&taken).unwrap().len() < MAX_MESSAGE_LEN - 100);
    }
}
