package service

import (
	"errors"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
)

// The errors of this package that end a service. Others match those of package vdi:
// [vdi.ErrLeft] if VBDs are left in the journal, or may be.
var (
	// ErrStateFolder: the state folder cannot be used, and waiting does not help.
	ErrStateFolder = errors.New("unusable state folder")
	// ErrListen: an address can never be listened on.
	ErrListen = errors.New("cannot listen")
	// ErrXapiUnreachable: xapi did not answer within startup_wait.
	ErrXapiUnreachable = errors.New("xapi unreachable")
)

// kindError is an error that matches kind, too. Its text is that of the error alone.
type kindError struct{ kind, err error }

func (e *kindError) Error() string   { return e.err.Error() }
func (e *kindError) Unwrap() []error { return []error{e.kind, e.err} }

// isPermanent reports whether further attempts are useless.
func isPermanent(err error) bool {
	return errors.Is(err, ErrListen) || errors.Is(err, ErrStateFolder)
}

// withoutKind removes the kind of an error, for a place where further attempts are made all
// the same.
func withoutKind(err error) error {
	if e, ok := errors.AsType[*kindError](err); ok {
		return e.err
	}
	return err
}

// recoveryKind is the kind of the error of a failed clean-up: ErrXapiUnreachable if nothing
// answered; vdi.ErrInventory; else vdi.ErrLeft, as it is not known whether something is
// left. That is so too if xapi's answer is an error, or cannot be used.
func recoveryKind(err error) error {
	_, lost := errors.AsType[*xapi.TransportError](err)
	_, refused := errors.AsType[*xapi.Error](err)
	switch {
	case errors.Is(err, xapi.ErrAnswer) || refused:
		return vdi.ErrLeft
	case lost:
		return ErrXapiUnreachable
	case errors.Is(err, vdi.ErrInventory):
		return vdi.ErrInventory
	}
	return vdi.ErrLeft
}

// The kinds of errors in a RecoverReport.
const (
	failureXapi      = "unreachable"
	failureInventory = "inventory"
	failureLeft      = "left"
)

// newRecoverReport makes the answer to POST /recover.
func newRecoverReport(result vdi.Recovered, err error) control.RecoverReport {
	report := control.RecoverReport{Recovered: result}
	if err != nil {
		report.Error, report.Failure = err.Error(), failureLeft
		switch kind := recoveryKind(err); {
		case errors.Is(kind, ErrXapiUnreachable):
			report.Failure = failureXapi
		case errors.Is(kind, vdi.ErrInventory):
			report.Failure = failureInventory
		}
	}
	return report
}

// recoverError is the error of a RecoverReport, nil if there is none.
func recoverError(report control.RecoverReport) error {
	if report.Error == "" {
		return nil
	}
	kind := vdi.ErrLeft
	switch report.Failure {
	case failureXapi:
		kind = ErrXapiUnreachable
	case failureInventory:
		kind = vdi.ErrInventory
	}
	return &kindError{kind, errors.New(report.Error)}
}
