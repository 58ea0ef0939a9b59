//! Feeds an actix actor from its [`Inbox`].

use std::{
    pin::Pin,
    task::{Poll, ready},
};

use actix::{Actor, ActorContext, ActorFuture, ActorState, AsyncContext, Context};
use futures::stream::{BoxStream, StreamExt};

use crate::Inbox;

/// Handles the inbox's messages one after the other, from [`Actor::started`] until the actor stops; a closed and empty
/// inbox stops it.
///
/// A message leaves the inbox only when its turn comes: an actor that panics loses the one at hand, an actor that stops
/// none. A handler that has to wait gives the future to [`AsyncContext::wait`]; the next message comes after it.
pub fn pump<A, T>(
    ctx: &mut Context<A>,
    inbox: Inbox<T>,
    handle: impl FnMut(&mut A, T, &mut Context<A>) + Unpin + 'static,
) where
    A: Actor<Context = Context<A>>,
    T: Send + 'static,
{
    let next = |inbox: Inbox<T>| async { inbox.next().await.map(|message| (message, inbox)) };
    let messages = futures::stream::unfold(inbox, next).boxed();
    ctx.spawn(Pump { messages, handle });
}

struct Pump<T, F> {
    messages: BoxStream<'static, T>,
    handle: F,
}

impl<A, T, F> ActorFuture<A> for Pump<T, F>
where
    A: Actor<Context = Context<A>>,
    F: FnMut(&mut A, T, &mut Context<A>) + Unpin,
{
    type Output = ();

    fn poll(
        mut self: Pin<&mut Self>,
        actor: &mut A,
        ctx: &mut Context<A>,
        task: &mut std::task::Context<'_>,
    ) -> Poll<()> {
        loop {
            if matches!(ctx.state(), ActorState::Stopping | ActorState::Stopped) {
                return Poll::Ready(());
            }
            if ctx.waiting() {
                // The context polls everything again when the wait is over.
                return Poll::Pending;
            }
            let Some(message) = ready!(self.messages.as_mut().poll_next(task)) else {
                ctx.stop();
                return Poll::Ready(());
            };
            (self.handle)(actor, message, ctx);
        }
    }
}
