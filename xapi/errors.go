package xapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"

	"xapi-nbd/xapi/internal/xmlrpc"
)

// ErrorCode is the first element of xapi's ErrorDescription. It is an error so
// that errors.Is(err, xapi.SessionInvalid) works. Codes that are not listed here occur too
// and are returned as they are.
type ErrorCode string

// Error returns the code as xapi spells it.
func (c ErrorCode) Error() string { return string(c) }

// The codes that the service handles. The number of parameters is not fixed by the code:
// VDI_IN_USE has none, one, two or many.
const (
	// Sessions and permissions.

	// SessionInvalid: the session is unknown, expired, evicted or logged out, or
	// xapi on the pool master restarted, which ends every session.
	SessionInvalid ErrorCode = "SESSION_INVALID"
	// SessionAuthenticationFailed: wrong credentials. Never on the local socket.
	SessionAuthenticationFailed ErrorCode = "SESSION_AUTHENTICATION_FAILED"
	// RBACPermissionDenied: the session's role may not make this call; the first
	// parameter is the missing permission in lower case.
	RBACPermissionDenied ErrorCode = "RBAC_PERMISSION_DENIED"

	// Arguments and objects.

	// HandleInvalid: the object of that class and ref is gone. With the class
	// `session`: destroyed between check and use, or an emergency local session.
	HandleInvalid ErrorCode = "HANDLE_INVALID"
	// UUIDInvalid: get_by_uuid found nothing, well-formed uuid or not.
	UUIDInvalid ErrorCode = "UUID_INVALID"
	// InvalidValue: a parameter xapi cannot read, such as broken UTF-8.
	InvalidValue ErrorCode = "INVALID_VALUE"
	// InternalError: an unexpected exception in xapi, with its OCaml text; also illegal
	// storage transitions during plug and unplug.
	InternalError ErrorCode = "INTERNAL_ERROR"
	// MessageMethodUnknown: this xapi has no such call.
	MessageMethodUnknown ErrorCode = "MESSAGE_METHOD_UNKNOWN"

	// Life of a VBD.

	// DeviceAlreadyAttached: VBD.plug of an attached VBD.
	DeviceAlreadyAttached ErrorCode = "DEVICE_ALREADY_ATTACHED"
	// DeviceAlreadyDetached: VBD.unplug of a detached VBD.
	DeviceAlreadyDetached ErrorCode = "DEVICE_ALREADY_DETACHED"
	// DeviceDetachRejected: the guest refused the unplug.
	DeviceDetachRejected ErrorCode = "DEVICE_DETACH_REJECTED"
	// OperationNotAllowed: VBD.destroy of an attached VBD, or plug while the VM
	// shuts down.
	OperationNotAllowed ErrorCode = "OPERATION_NOT_ALLOWED"
	// OtherOperationInProgress: another operation holds the object. For plug and unplug
	// xapi retries for up to two hours before it returns this.
	OtherOperationInProgress ErrorCode = "OTHER_OPERATION_IN_PROGRESS"
	// VBDNotUnpluggable: unplug of a VBD created with unpluggable=false.
	VBDNotUnpluggable ErrorCode = "VBD_NOT_UNPLUGGABLE"
	// InvalidDevice: the VM has no free userdevice number left.
	InvalidDevice ErrorCode = "INVALID_DEVICE"
	// DeviceAlreadyExists: the userdevice number is taken.
	DeviceAlreadyExists ErrorCode = "DEVICE_ALREADY_EXISTS"

	// VDI and storage, raised by VBD.plug unless said otherwise.

	// VDIInUse: another operation or attachment excludes this one.
	VDIInUse ErrorCode = "VDI_IN_USE"
	// VDIMissing: the storage manager cannot find the image.
	VDIMissing ErrorCode = "VDI_MISSING"
	// VDINotManaged: xapi does not manage the VDI; the parameter is the VBD's ref.
	VDINotManaged ErrorCode = "VDI_NOT_MANAGED"
	// VDIIncompatibleType: VBD.create for CBT metadata, an HA statefile or a redo
	// log; the second parameter is display text.
	VDIIncompatibleType ErrorCode = "VDI_INCOMPATIBLE_TYPE"
	// SRHasNoPBDs: this host has no PBD for the VDI's SR.
	SRHasNoPBDs ErrorCode = "SR_HAS_NO_PBDS"
	// SRNotAttached: the SR is not attached on this host.
	SRNotAttached ErrorCode = "SR_NOT_ATTACHED"
	// SRUnhealthy: cluster or SMAPIv3 storage reports trouble.
	SRUnhealthy ErrorCode = "SR_UNHEALTHY"
	// SRBackendFailure: the storage manager failed. With a number the code is
	// SR_BACKEND_FAILURE_n; errors.Is matches this constant for all of them.
	SRBackendFailure ErrorCode = "SR_BACKEND_FAILURE"

	// Availability.

	// HostStillBooting: xapi answers but its database is not ready.
	HostStillBooting ErrorCode = "HOST_STILL_BOOTING"
	// HostHasNoManagementIP and the codes up to HostBroken: the host is in emergency
	// mode, like a pool supporter that has not reached its master.
	HostHasNoManagementIP    ErrorCode = "HOST_HAS_NO_MANAGEMENT_IP"
	HostItsOwnSlave          ErrorCode = "HOST_ITS_OWN_SLAVE"
	HostUnknownToMaster      ErrorCode = "HOST_UNKNOWN_TO_MASTER"
	HostMasterCannotTalkBack ErrorCode = "HOST_MASTER_CANNOT_TALK_BACK"
	HostBroken               ErrorCode = "HOST_BROKEN"
	// HostIsSlave: a pool supporter was asked over TCP; not on the local socket.
	HostIsSlave ErrorCode = "HOST_IS_SLAVE"
	// HostOffline: the master considers the VBD's host dead.
	HostOffline ErrorCode = "HOST_OFFLINE"
	// CannotContactHost: the master could not reach the VBD's host.
	CannotContactHost ErrorCode = "CANNOT_CONTACT_HOST"
	// TaskCancelled: the call's task was cancelled.
	TaskCancelled ErrorCode = "TASK_CANCELLED"
)

// ErrArgument is matched by errors about a call that cannot be encoded (control characters,
// invalid UTF-8, unsafe map keys). Nothing was sent.
var ErrArgument = xmlrpc.ErrArgument

// Error is a failure that xapi reported. Params never holds a session ref: those
// are replaced by "<session>" when the error is made.
type Error struct {
	Method string
	Code   ErrorCode
	Params []string
}

// newError makes an Error of an ErrorDescription with at least one element.
// secret is the ref of the calling session, "" when there is none.
func newError(method string, description []string, secret string) *Error {
	e := &Error{Method: method, Code: ErrorCode(description[0])}
	for i, p := range description[1:] {
		// These two name the rejected session, which need not be the calling one.
		isRef := sessionEnded(e.Code, description[1:]) && (e.Code == SessionInvalid || i > 0)
		if isRef || secret != "" && strings.Contains(p, secret) {
			p = redacted
		}
		e.Params = append(e.Params, p)
	}
	return e
}

// SessionEnded reports whether err is xapi's answer that a session does not exist, mostly
// the calling one. The code is SESSION_INVALID, or HANDLE_INVALID of class session if the
// session ended during the call.
func SessionEnded(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && sessionEnded(e.Code, e.Params)
}

func sessionEnded(code ErrorCode, params []string) bool {
	return code == SessionInvalid || code == HandleInvalid && len(params) > 0 && strings.EqualFold(params[0], "session")
}

// maxParamText bounds a parameter in the text of an Error, not in Params. SR_BACKEND_FAILURE_n
// contains the whole standard error of the storage manager.
const maxParamText = 256

// Error returns the method, the code and the parameters, quoted and clipped.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "xapi: %s: %s", e.Method, e.Code)
	for i, p := range e.Params {
		if len(p) > maxParamText {
			p = strings.ToValidUTF8(p[:maxParamText], "") + "…"
		}
		sep := ", "
		if i == 0 {
			sep = " ["
		}
		fmt.Fprintf(&b, "%s%q", sep, p)
	}
	if len(e.Params) > 0 {
		b.WriteByte(']')
	}
	return b.String()
}

// NotReady reports whether err means that xapi cannot execute calls yet: the host is
// booting, or is a pool supporter that has not reached its master (api_server.ml, emergency
// mode), or the master's database is not ready.
func (e *Error) NotReady() bool {
	switch e.Code {
	case HostStillBooting, HostHasNoManagementIP, HostItsOwnSlave, HostUnknownToMaster, HostMasterCannotTalkBack, HostBroken:
		return true
	case UUIDInvalid:
		return len(e.Params) > 0 && e.Params[0] == "host"
	case InternalError:
		return slices.ContainsFunc(e.Params, func(p string) bool { return strings.Contains(p, "Db_exn") })
	}
	return false
}

// Is reports whether target is the error's code.
func (e *Error) Is(target error) bool {
	code, ok := target.(ErrorCode)
	if !ok {
		return false
	}
	return e.Code == code ||
		code == SRBackendFailure && strings.HasPrefix(string(e.Code), string(SRBackendFailure)+"_")
}

// ErrAnswer is matched by a *TransportError if there was an answer that cannot be used: an
// HTTP status other than 200, a reply that is too long or malformed. A TransportError that
// does not match it means that there was no answer.
var ErrAnswer = errors.New("unusable answer")

// answerError makes err match ErrAnswer.
type answerError struct{ err error }

func (e *answerError) Error() string   { return e.err.Error() }
func (e *answerError) Unwrap() []error { return []error{ErrAnswer, e.err} }

// TransportError is the error of a call without a usable answer: no connection, a broken
// connection, a time limit, or an answer that matches ErrAnswer.
type TransportError struct {
	Method string
	// Sent reports that there was a connection, so xapi may have executed the call or may
	// still do so. If it is false xapi has not received the call.
	Sent bool
	Err  error
}

// Error returns the method and the cause.
func (e *TransportError) Error() string {
	if !e.Sent {
		return fmt.Sprintf("xapi: %s: not sent: %v", e.Method, e.Err)
	}
	return fmt.Sprintf("xapi: %s: %v", e.Method, e.Err)
}

// Unwrap returns the cause, which reaches the context's error and the system's.
func (e *TransportError) Unwrap() error { return e.Err }

var errNotHTTP error = &answerError{errors.New("the reply is not HTTP")}

// transportCause returns err, or a replacement without bytes of the peer. net/http quotes
// the bytes that it cannot parse, which may be a reply with a session ref.
func transportCause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op
	}
	for _, known := range []error{io.ErrUnexpectedEOF, io.EOF} {
		if errors.Is(err, known) {
			return io.ErrUnexpectedEOF // an EOF is never expected before the reply's end
		}
	}
	return errNotHTTP
}

// contextError returns the cause of a finished ctx. The error also matches context.Canceled
// or context.DeadlineExceeded.
func contextError(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if errors.Is(cause, err) {
		return cause
	}
	return fmt.Errorf("%w (%w)", cause, err)
}
