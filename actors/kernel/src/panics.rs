//! Keeping a panic of foreign code (a backend, a service, a codec, a `Drop`) where it happened.

use std::{
    any::Any,
    mem,
    ops::{Deref, DerefMut},
    panic::{AssertUnwindSafe, catch_unwind},
};

use futures::FutureExt;
use tracing::error;

/// Runs `work`; a panic comes back as its message. What `work` left half done is the caller's to judge.
pub fn contain<R>(work: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(text)
}

/// Awaits `work`; a panic comes back as its message.
pub async fn contain_future<R>(work: impl Future<Output = R>) -> Result<R, String> {
    AssertUnwindSafe(work).catch_unwind().await.map_err(text)
}

/// Drops a value of foreign code; a panic ends here, logged.
pub fn drop_contained<T>(value: T) {
    if let Err(panic) = contain(|| drop(value)) {
        error!(panic, value = std::any::type_name::<T>(), "a panic while something was dropped");
    }
}

/// The message of a panic.
fn text(panic: Box<dyn Any + Send>) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned());
    // What was thrown may itself panic when it is dropped.
    if let Err(another) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        mem::forget(another);
    }
    text
}

/// A value of foreign code whose `Drop` may panic: then the panic ends with it.
#[derive(Debug)]
pub struct Contained<T>(Option<T>);

impl<T> Contained<T> {
    /// Wraps a value.
    pub fn new(value: T) -> Self {
        Self(Some(value))
    }
}

impl<T> Deref for Contained<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("only dropping takes the value")
    }
}

impl<T> DerefMut for Contained<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("only dropping takes the value")
    }
}

impl<T> Drop for Contained<T> {
    fn drop(&mut self) {
        drop_contained(self.0.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fragile(&'static str);

    impl Drop for Fragile {
        fn drop(&mut self) {
            panic!("{} breaks", self.0);
        }
    }

    #[tokio::test]
    async fn a_panic_comes_back_as_its_message() {
        assert_eq!(contain(|| 7), Ok(7));
        assert_eq!(contain(|| -> () { panic!("boom") }), Err("boom".to_owned()));
        assert_eq!(contain(|| -> () { panic!("boom {}", 7) }), Err("boom 7".to_owned()));
        assert_eq!(contain(|| -> () { std::panic::panic_any(7) }), Err("no message".to_owned()));
        let later = contain_future(async { panic!("boom") });
        assert_eq!(later.await.map(|(): ()| ()), Err("boom".to_owned()));
    }

    #[test]
    fn what_was_thrown_may_break_too() {
        assert_eq!(
            contain(|| -> () { std::panic::panic_any(Fragile("what was thrown")) }),
            Err("no message".to_owned())
        );
    }

    #[test]
    fn a_value_that_panics_when_dropped_ends_alone_even_while_another_panic_unwinds() {
        drop(Contained::new(Fragile("this")));
        let unwinding = contain(|| {
            let _kept = Contained::new(Fragile("this"));
            panic!("boom");
        });
        assert_eq!(unwinding.map(|(): ()| ()), Err("boom".to_owned()));
    }
}
