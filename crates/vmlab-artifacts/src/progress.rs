//! How the library tells its caller what takes time.

/// What a long operation reports while it runs. All methods do nothing unless overridden.
///
/// The methods are called from the thread that runs the operation, except where two downloads run
/// side by side.
pub trait Progress: Sync {
    /// A new phase begins: `refresh the package lists`, `download linux-image-…`, `unpack`.
    fn phase(&self, _name: &str) {}

    /// Something that the user should know, whether the operation is shown or not.
    fn note(&self, _text: &str) {}

    /// Bytes of the current download that have arrived, and how many there will be.
    fn download(&self, _done: u64, _total: Option<u64>) {}
}

/// Says which process is waited for that makes the same thing; `doing` as in `fetching the same kernel`.
pub(crate) fn waiting(progress: &dyn Progress, doing: &str) -> impl Fn(Option<u32>) {
    move |pid| {
        let who = pid.map_or("another process".to_owned(), |pid| format!("process {pid}"));
        progress.note(&format!("waiting for {who}, which is {doing}"));
    }
}

/// Reports nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {}
