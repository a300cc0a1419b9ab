// Package xapi is a typed client of the Xen API over XML-RPC and HTTP on xapi's local unix
// socket. It has only the calls that the export of a VDI needs: no remote (TLS) transport,
// no event stream and no asynchronous calls.
//
// A Client is safe for concurrent use, and so is a Session. Each call is bounded
// by its context and by the time limits of Config, whichever ends first.
//
// # Errors
//
// An *Error is xapi's answer: the call failed in xapi. Match its code with errors.Is(err,
// xapi.SessionInvalid).
//
// A *TransportError means that there was no usable answer. It matches ErrAnswer if there was
// an answer of any kind. Its Sent field reports whether xapi may have executed the call
// nevertheless: VBD.plug continues inside xapi after the connection breaks, and VBD.create
// may leave a VBD whose ref the client did not receive.
//
// An error that matches ErrArgument means that the call cannot be encoded, for instance
// because of a control character in a string. Nothing was sent.
//
// # Session refs are secrets
//
// A session ref gives its holder the permissions of the session. A SessionRef is therefore
// never formatted, logged or marshalled as plain text, and the ref of the calling session
// is replaced in the texts and parameters of errors.
package xapi
