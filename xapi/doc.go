// Package xapi is a typed client of the Xen API, spoken as XML-RPC over HTTP on
// xapi's local unix socket. It covers the calls that exporting a VDI needs, no
// more: there is no remote (TLS) transport, no event stream and no asynchronous
// call.
//
// A Client is safe for concurrent use, and so is a Session. Each call is bounded
// by its context and by the time limits of Config, whichever ends first.
//
// # What an error means
//
// *Error is xapi's own answer: it executed the call and refused. Match its code
// with errors.Is(err, xapi.SessionInvalid).
//
// *TransportError is anything else that kept a usable answer from arriving. It
// matches ErrAnswer when something answered all the same. Its Sent
// field tells whether xapi may have executed the call all the same: VBD.plug goes
// on inside xapi when the connection breaks, and VBD.create may leave a VBD whose
// ref nobody knows.
//
// An error matching ErrArgument is a call that cannot be expressed, for instance
// with a control character in a string; nothing was sent.
//
// # Session refs are secrets
//
// Whoever knows a session ref has its permissions. A SessionRef therefore never
// formats, logs or marshals as itself, and error texts and parameters that
// contain the ref of the calling session are replaced when the error is made.
package xapi
