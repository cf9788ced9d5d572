//! The messages of 9P2000.L, as far as bytes go: requests are taken apart here, with every length checked against what
//! there is, and answers put together. What a request means is for [`super::server`] to say.
//!
//! A message is its length, a type and a tag, then what its type needs. Numbers are little-endian; a string is two bytes
//! of length and as many bytes, of any value: names need not be UTF-8.

use std::ffi::CString;
use std::io;

use rustix::io::Errno;

use crate::virtio::queue::Readable;

/// Length, type and tag.
pub(super) const HEADER_LEN: usize = 7;
/// An error, or the header and count of data that is read: the shortest room that a request may leave for its answer.
pub(super) const SHORTEST_ROOM: usize = HEADER_LEN + size_of::<u32>();
/// Most names in a walk, by the protocol.
const MAX_WALK: usize = 16;
/// NAME_MAX of Linux, for names of files and of extended attributes.
const MAX_NAME: usize = 255;
/// PATH_MAX of Linux without the terminator.
const MAX_TARGET: usize = 4095;
/// Most bytes of a request without the data that it writes. The longest that Linux sends is a walk, or a symbolic link
/// with a name and a target.
const MAX_BODY: usize = 16 * 1024;
/// Bytes of a write before its data.
const WRITE_BODY: usize = 16;
/// A fid or a user that is none.
pub(super) const NONE: u32 = u32::MAX;

const RLERROR: u8 = 7;

/// What stands before every message.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    len: u32,
    kind: u8,
    tag: u16,
}

impl Header {
    /// Takes it off the front of a message. `None` if there is not so much.
    pub(super) fn take(message: &mut Readable<'_>) -> Option<Self> {
        let mut bytes = [0; HEADER_LEN];
        if message.read(&mut bytes) < HEADER_LEN {
            return None;
        }
        let mut body = Body(&bytes);
        Some(Self {
            len: body.u32().ok()?,
            kind: body.u8().ok()?,
            tag: body.u16().ok()?,
        })
    }

    /// Takes the rest of the message apart. What a write writes is left in `message`, and nothing else.
    pub(super) fn request(self, message: &mut Readable<'_>) -> io::Result<Request> {
        let len = usize::try_from(self.len).map_err(|_| Errno::PROTO)?;
        let len = len.checked_sub(HEADER_LEN).ok_or(Errno::PROTO)?;
        if len > message.len() {
            return Err(Errno::PROTO.into());
        }
        let mut whole = message.take(len);
        let body = match self.kind {
            Request::WRITE => whole.take(WRITE_BODY),
            _ => std::mem::take(&mut whole),
        };
        *message = whole;
        if body.len() > MAX_BODY {
            return Err(Errno::MSGSIZE.into());
        }
        let mut body = body;
        let mut bytes = vec![0; body.len()];
        body.read(&mut bytes);
        Request::parse(self.kind, &bytes)
    }

    /// The header of the answer that `body` bytes follow.
    pub(super) fn answer(self, body: usize) -> Answer {
        self.start(self.kind.wrapping_add(1), body)
    }

    /// The whole answer to a request that failed.
    pub(super) fn error(self, errno: i32) -> Answer {
        self.start(RLERROR, size_of::<u32>())
            .u32(errno.unsigned_abs())
    }

    fn start(self, kind: u8, body: usize) -> Answer {
        let len =
            u32::try_from(HEADER_LEN + body).expect("an answer is at most as long as its room");
        Answer::default().u32(len).u8(kind).u16(self.tag)
    }
}

/// A request, by what the device knows of it. Fields that no answer depends on are left out.
#[derive(Debug)]
pub(super) enum Request {
    Version {
        msize: u32,
        version: Vec<u8>,
    },
    Attach {
        fid: u32,
        afid: u32,
        user: u32,
    },
    Flush,
    Walk {
        fid: u32,
        new_fid: u32,
        names: Vec<CString>,
    },
    Open {
        fid: u32,
        flags: u32,
    },
    Create {
        fid: u32,
        name: CString,
        flags: u32,
        mode: u32,
        gid: u32,
    },
    Read {
        fid: u32,
        offset: u64,
        count: u32,
    },
    /// The data follows.
    Write {
        fid: u32,
        offset: u64,
        count: u32,
    },
    ReadDir {
        fid: u32,
        offset: u64,
        count: u32,
    },
    Clunk {
        fid: u32,
    },
    Remove {
        fid: u32,
    },
    GetAttr {
        fid: u32,
        mask: u64,
    },
    SetAttr {
        fid: u32,
        attributes: Attributes,
    },
    StatFs {
        fid: u32,
    },
    Fsync {
        fid: u32,
        data_only: bool,
    },
    ReadLink {
        fid: u32,
    },
    Symlink {
        dir: u32,
        name: CString,
        target: CString,
        gid: u32,
    },
    MakeNode {
        dir: u32,
        name: CString,
        mode: u32,
        major: u32,
        minor: u32,
        gid: u32,
    },
    MakeDir {
        dir: u32,
        name: CString,
        mode: u32,
        gid: u32,
    },
    Link {
        dir: u32,
        fid: u32,
        name: CString,
    },
    Rename {
        old_dir: u32,
        old_name: CString,
        new_dir: u32,
        new_name: CString,
    },
    Unlink {
        dir: u32,
        name: CString,
        flags: u32,
    },
    /// Without a name: the list of all.
    AttributeWalk {
        fid: u32,
        new_fid: u32,
        name: Option<CString>,
    },
    AttributeCreate {
        fid: u32,
        name: CString,
        size: u64,
        flags: u32,
    },
    Lock {
        fid: u32,
    },
    GetLock {
        fid: u32,
        start: u64,
        length: u64,
        process: u32,
        client: Vec<u8>,
    },
}

/// What Tsetattr changes; `valid` has a bit for each.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Attributes {
    pub(super) valid: u32,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    /// Seconds and nanoseconds.
    pub(super) accessed: (u64, u64),
    pub(super) modified: (u64, u64),
}

impl Request {
    const WRITE: u8 = 118;

    /// Takes the body of a request apart.
    ///
    /// # Errors
    /// EPROTO when it is too short or too long, EOPNOTSUPP for a type that is not served, and what Linux says of a name
    /// that no file can have.
    fn parse(kind: u8, bytes: &[u8]) -> io::Result<Self> {
        let mut body = Body(bytes);
        let request = match kind {
            8 => Self::StatFs { fid: body.u32()? },
            12 => Self::Open {
                fid: body.u32()?,
                flags: body.u32()?,
            },
            14 => Self::Create {
                fid: body.u32()?,
                name: body.name()?,
                flags: body.u32()?,
                mode: body.u32()?,
                gid: body.u32()?,
            },
            16 => Self::Symlink {
                dir: body.u32()?,
                name: body.name()?,
                target: body.target()?,
                gid: body.u32()?,
            },
            18 => Self::MakeNode {
                dir: body.u32()?,
                name: body.name()?,
                mode: body.u32()?,
                major: body.u32()?,
                minor: body.u32()?,
                gid: body.u32()?,
            },
            22 => Self::ReadLink { fid: body.u32()? },
            24 => Self::GetAttr {
                fid: body.u32()?,
                mask: body.u64()?,
            },
            26 => Self::SetAttr {
                fid: body.u32()?,
                attributes: body.attributes()?,
            },
            30 => Self::AttributeWalk {
                fid: body.u32()?,
                new_fid: body.u32()?,
                name: body.attribute_name()?,
            },
            32 => Self::AttributeCreate {
                fid: body.u32()?,
                name: body.attribute_name()?.ok_or(Errno::INVAL)?,
                size: body.u64()?,
                flags: body.u32()?,
            },
            40 => Self::ReadDir {
                fid: body.u32()?,
                offset: body.u64()?,
                count: body.u32()?,
            },
            50 => Self::Fsync {
                fid: body.u32()?,
                data_only: body.u32()? != 0,
            },
            52 => body.lock()?,
            54 => body.get_lock()?,
            70 => Self::Link {
                dir: body.u32()?,
                fid: body.u32()?,
                name: body.name()?,
            },
            72 => Self::MakeDir {
                dir: body.u32()?,
                name: body.name()?,
                mode: body.u32()?,
                gid: body.u32()?,
            },
            74 => Self::Rename {
                old_dir: body.u32()?,
                old_name: body.name()?,
                new_dir: body.u32()?,
                new_name: body.name()?,
            },
            76 => Self::Unlink {
                dir: body.u32()?,
                name: body.name()?,
                flags: body.u32()?,
            },
            100 => Self::Version {
                msize: body.u32()?,
                version: body.string()?.to_vec(),
            },
            104 => body.attach()?,
            108 => {
                body.u16()?;
                Self::Flush
            }
            110 => body.walk()?,
            116 => Self::Read {
                fid: body.u32()?,
                offset: body.u64()?,
                count: body.u32()?,
            },
            Self::WRITE => Self::Write {
                fid: body.u32()?,
                offset: body.u64()?,
                count: body.u32()?,
            },
            120 => Self::Clunk { fid: body.u32()? },
            122 => Self::Remove { fid: body.u32()? },
            _ => return Err(Errno::OPNOTSUPP.into()),
        };
        if !body.0.is_empty() {
            return Err(Errno::PROTO.into());
        }
        Ok(request)
    }
}

/// What is left of a request's body.
struct Body<'b>(&'b [u8]);

impl<'b> Body<'b> {
    fn bytes(&mut self, len: usize) -> io::Result<&'b [u8]> {
        let (front, rest) = self.0.split_at_checked(len).ok_or(Errno::PROTO)?;
        self.0 = rest;
        Ok(front)
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let (front, rest) = self.0.split_first_chunk().ok_or(Errno::PROTO)?;
        self.0 = rest;
        Ok(*front)
    }

    fn u8(&mut self) -> io::Result<u8> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> io::Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> io::Result<&'b [u8]> {
        let len = self.u16()?;
        self.bytes(len.into())
    }

    fn text(&mut self, longest: usize) -> io::Result<CString> {
        let bytes = self.string()?;
        if bytes.len() > longest {
            return Err(Errno::NAMETOOLONG.into());
        }
        CString::new(bytes).map_err(|_| Errno::INVAL.into())
    }

    /// The name of a file in its folder. Linux's client never sends "." and "..": its kernel resolves them.
    fn name(&mut self) -> io::Result<CString> {
        let name = self.text(MAX_NAME)?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL.into()),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL.into()),
            _ => Ok(name),
        }
    }

    fn target(&mut self) -> io::Result<CString> {
        self.text(MAX_TARGET)
    }

    fn attribute_name(&mut self) -> io::Result<Option<CString>> {
        let name = self.text(MAX_NAME)?;
        Ok(Some(name).filter(|name| !name.is_empty()))
    }

    fn attach(&mut self) -> io::Result<Request> {
        let (fid, afid) = (self.u32()?, self.u32()?);
        // The user by name, and a name of what is attached: there is one folder, and users are numbers.
        let (_user, _tree) = (self.string()?, self.string()?);
        let user = self.u32()?;
        Ok(Request::Attach { fid, afid, user })
    }

    fn walk(&mut self) -> io::Result<Request> {
        let (fid, new_fid) = (self.u32()?, self.u32()?);
        let count = usize::from(self.u16()?);
        if count > MAX_WALK {
            return Err(Errno::INVAL.into());
        }
        let names = (0..count).map(|_| self.name()).collect::<Result<_, _>>()?;
        Ok(Request::Walk {
            fid,
            new_fid,
            names,
        })
    }

    fn attributes(&mut self) -> io::Result<Attributes> {
        Ok(Attributes {
            valid: self.u32()?,
            mode: self.u32()?,
            uid: self.u32()?,
            gid: self.u32()?,
            size: self.u64()?,
            accessed: (self.u64()?, self.u64()?),
            modified: (self.u64()?, self.u64()?),
        })
    }

    fn lock(&mut self) -> io::Result<Request> {
        let fid = self.u32()?;
        // Kind, flags, start, length and process.
        self.bytes(1 + 4 + 8 + 8 + 4)?;
        let _client = self.string()?;
        Ok(Request::Lock { fid })
    }

    fn get_lock(&mut self) -> io::Result<Request> {
        let fid = self.u32()?;
        let _kind = self.u8()?;
        Ok(Request::GetLock {
            fid,
            start: self.u64()?,
            length: self.u64()?,
            process: self.u32()?,
            client: self.string()?.to_vec(),
        })
    }
}

/// What tells one file of the folder from another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Qid {
    pub(super) kind: u8,
    pub(super) version: u32,
    pub(super) path: u64,
}

/// An answer, or the body of one, in the making.
#[derive(Debug, Default)]
pub(super) struct Answer(Vec<u8>);

impl Answer {
    pub(super) fn u8(self, value: u8) -> Self {
        self.bytes(&[value])
    }

    pub(super) fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn qid(self, qid: Qid) -> Self {
        self.u8(qid.kind).u32(qid.version).u64(qid.path)
    }

    /// A string, which has at most 65535 bytes.
    pub(super) fn string(self, bytes: &[u8]) -> Self {
        let len = u16::try_from(bytes.len()).expect("no string of a file system is that long");
        self.u16(len).bytes(bytes)
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}
