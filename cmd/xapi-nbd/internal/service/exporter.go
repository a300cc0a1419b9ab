package service

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"slices"
	"syscall"
	"time"

	"xapi-nbd/auth"
	"xapi-nbd/nbd"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
)

// *vdi.Disk implements these interfaces although package vdi does not import nbd.
var (
	_ nbd.Device          = (*vdi.Disk)(nil)
	_ nbd.BlockSizer      = (*vdi.Disk)(nil)
	_ nbd.Describer       = (*vdi.Disk)(nil)
	_ nbd.Namer           = (*vdi.Disk)(nil)
	_ nbd.Revocable       = (*vdi.Disk)(nil)
	_ nbd.ErrorCloser     = (*watchedDisk)(nil)
	_ nbd.FileBacked      = (*vdi.Disk)(nil)
	_ nbd.ContextExporter = (*exporter)(nil)
	_ nbd.Rechecker       = (*exporter)(nil)
	_ nbd.Contexter       = (*watchedDisk)(nil)
	_ nbd.DataRunner      = (*watchedDisk)(nil)
	_ nbd.Pacer           = (*watchedDisk)(nil)
)

// authorizer and attacher are the methods of *auth.Authorizer and *vdi.Manager that the
// exporter uses. Tests in fake time, which cannot use a simulated host, replace them.
type (
	authorizer interface {
		Authorize(ctx context.Context, peer string, r auth.Request) (auth.Grant, error)
	}
	attacher interface {
		Attach(ctx context.Context, s *xapi.Session, vdiUUID string, bases ...string) (*vdi.Disk, error)
		AttachWritable(ctx context.Context, s *xapi.Session, vdiUUID string) (*vdi.WritableDisk, error)
	}
)

// exporter opens exports: it authorizes the session of an export name, and then attaches
// the VDI. In this order, so that nothing is plugged for an unauthorized client.
type exporter struct {
	sessions authorizer
	timeout  func() time.Duration // for authorizing and attaching, in all
	rechecks *auth.Rechecker
	disks    attacher
	rates    *rates
	ready    firstResponse
	draining *drainState
	mayWrite func() bool // the setting allow_write
	// admit refuses clients without TLS if that is required by now.
	admit func(ctx context.Context, peer nbd.Peer) error
}

// Open implements nbd.Exporter.
func (e *exporter) Open(ctx context.Context, peer nbd.Peer, name string) (nbd.Device, error) {
	return e.open(ctx, peer, name, nil)
}

// open is Open for a client that asks for these contexts about changed blocks. A VDI that is
// written has none.
func (e *exporter) open(ctx context.Context, peer nbd.Peer, name string, queries []string) (nbd.Device, error) {
	req, err := e.parse(ctx, peer, name)
	if err != nil {
		return nil, err
	}
	disk, err := e.attach(ctx, peer.Remote, req, queries)
	if err != nil {
		return nil, byRule(refusal(err))
	}
	return disk, nil
}

// Recheck implements nbd.Rechecker: the settings may have changed since the export was opened.
func (e *exporter) Recheck(ctx context.Context, peer nbd.Peer, name string) error {
	req, err := auth.ParseExportName(name)
	switch {
	case err != nil:
		return byRule(reasonName, nbd.Refuse(nbd.ErrInvalid, err.Error(), nil))
	case req.Write && !e.mayWrite():
		return errNoWriting
	}
	return e.admit(ctx, peer)
}

// parse parses an export name. It fails while the service opens no exports, and for a client
// that the settings do not permit it. Its errors are sent to the peer.
func (e *exporter) parse(ctx context.Context, peer nbd.Peer, name string) (auth.Request, error) {
	req, err := auth.ParseExportName(name)
	switch {
	case err != nil:
		return req, byRule(reasonName, nbd.Refuse(nbd.ErrInvalid, err.Error(), nil))
	case req.Write && !e.mayWrite():
		return req, errNoWriting
	case e.draining.isOn():
		return req, errDraining
	case !e.ready.wait(ctx):
		return req, e.ready.missing()
	}
	return req, e.admit(ctx, peer)
}

// errNoWriting refuses clients that want to write.
var errNoWriting = byRule(reasonNoWriting, nbd.Refuse(nbd.ErrPolicy, "writing is not allowed: allow_write is false in the configuration of the service", nil))

// errDeviceReadOnly is the kind of the error of a device that cannot be opened for writing.
var errDeviceReadOnly = errors.New("the device cannot be opened for writing")

// errSlowXapi is the cause when an authorization exceeds the timeout.
var errSlowXapi = errors.New("xapi did not answer within attach_timeout")

// attach authorizes and attaches, both together within the timeout. Its errors are not
// meant for the peer: see refusal.
func (e *exporter) attach(ctx context.Context, from net.Addr, req auth.Request, queries []string) (nbd.Device, error) {
	deadline := time.Now().Add(e.timeout())
	grant, err := e.authorize(ctx, deadline, from, req)
	if err != nil {
		return nil, err
	}
	attaching, cancel := context.WithDeadlineCause(ctx, deadline, vdi.ErrStillAttaching)
	defer cancel()
	if req.Write {
		disk, err := e.disks.AttachWritable(attaching, grant.Session, req.VDI)
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) {
			return nil, &kindError{errDeviceReadOnly, err}
		}
		if err != nil {
			return nil, err
		}
		return &watchedWriter{e.watch(grant, req, disk.Disk), disk}, nil
	}
	contexts, bases := parseContexts(queries)
	disk, err := e.disks.Attach(attaching, grant.Session, req.VDI, bases...)
	if err != nil {
		return nil, err
	}
	d := e.watch(grant, req, disk)
	d.contexts = slices.DeleteFunc(contexts, func(c changesContext) bool { return !d.KnowsChanges(c.base) })
	return d, nil
}

// watch holds a disk to the limits, and ends it with the session of its client.
func (e *exporter) watch(grant auth.Grant, req auth.Request, disk *vdi.Disk) *watchedDisk {
	pace, leave := e.rates.join(req.VDI)
	return &watchedDisk{
		Disk: disk, pace: pace, stopPacing: leave, stopWatching: e.rechecks.Watch(grant, disk.Revoke),
	}
}

func (e *exporter) authorize(ctx context.Context, deadline time.Time, from net.Addr, req auth.Request) (auth.Grant, error) {
	ctx, cancel := context.WithDeadlineCause(ctx, deadline, errSlowXapi)
	defer cancel()
	return e.sessions.Authorize(ctx, peerName(from), req)
}

// peerName returns the key by which peers are told apart: the IPv4 address, or the /64
// network of an IPv6 address. All peers on unix sockets have the key "".
func peerName(addr net.Addr) string {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return ""
	}
	ip := tcp.AddrPort().Addr().Unmap()
	if ip.Is6() {
		if network, err := ip.WithZone("").Prefix(64); err == nil {
			return network.String()
		}
	}
	return ip.String()
}

// watchedDisk is a disk that is revoked when its client's session ends, and that
// is read and written no faster than the limits allow.
type watchedDisk struct {
	*vdi.Disk
	*pace
	contexts     []changesContext // those that were granted
	stopPacing   func()
	stopWatching func()
}

// Close implements nbd.Device.
func (d *watchedDisk) Close() error {
	d.stop()
	return d.Disk.Close()
}

// CloseWithError implements nbd.ErrorCloser.
func (d *watchedDisk) CloseWithError(err error) error {
	d.stop()
	return d.Disk.CloseWithError(err)
}

func (d *watchedDisk) stop() {
	d.stopWatching()
	d.stopPacing()
}

// refusal returns the answer to the client for an error of attach, and the rule under which
// the refusal is counted. The log gets the whole error. Only here and in xapiRefusal do
// errors of the service become errors of NBD.
func refusal(err error) (reason string, answer error) {
	var (
		role  *auth.PermissionError
		limit *vdi.LimitError
		size  *vdi.SizeError
		alone *vdi.ExclusiveError

		detaching *vdi.DetachingError
		lost      *xapi.TransportError
		xe        *xapi.Error
	)
	switch {
	case errors.Is(err, auth.ErrSession):
		return reasonSession, nbd.Refuse(nbd.ErrPolicy, sessionRejected(err), err)
	case errors.Is(err, auth.ErrTooManyRejections):
		return reasonRejections, nbd.Refuse(nbd.ErrPolicy, err.Error(), nil)
	case errors.As(err, &role):
		return reasonRole, nbd.Refuse(nbd.ErrPolicy, role.Error(), nil)
	case errors.As(err, &limit):
		return reasonVBDs, nbd.Refuse(nbd.ErrPolicy, limit.Error(), nil)
	case errors.As(err, &size):
		return reasonSize, nbd.Refuse(nbd.ErrUnknownExport, size.Error(), nil)
	case errors.Is(err, errDeviceReadOnly):
		return reasonNoWriting, nbd.Refuse(nbd.ErrPolicy, errDeviceReadOnly.Error(), err)
	case errors.As(err, &alone):
		return reasonExclusive, nbd.Refuse(nbd.ErrPolicy, alone.Error(), nil)
	case errors.As(err, &detaching):
		return reasonDetaching, nbd.Refuse(nbd.ErrUnknownExport, detaching.Error(), nil)
	case errors.Is(err, vdi.ErrLocked):
		return reasonLocked, nbd.Refuse(nbd.ErrPolicy, "another instance of the service works on this host", err)
	case errors.Is(err, vdi.ErrJournalLocked):
		return reasonJournal, nbd.Refuse(nbd.ErrUnknownExport, vdi.ErrJournalLocked.Error(), err)
	case errors.Is(err, vdi.ErrStillAttaching):
		return reasonAttaching, nbd.Refuse(nbd.ErrUnknownExport, vdi.ErrStillAttaching.Error(), nil)
	case errors.Is(err, vdi.ErrLost):
		return reasonLost, nbd.Refuse(nbd.ErrUnknownExport, vdi.ErrLost.Error(), err)
	case errors.Is(err, vdi.ErrClosed):
		return reasonStopping, nbd.Refuse(nbd.ErrShutdown, "", err)
	case errors.As(err, &lost):
		return xapiUnusable(err)
	case errors.As(err, &xe):
		return xapiRefusal(xe, err)
	}
	return reasonOther, err
}

// xapiUnusable is refusal for a *xapi.TransportError. Without any answer xapi is
// unreachable; with one that cannot be parsed it is not.
func xapiUnusable(err error) (reason string, answer error) {
	if errors.Is(err, xapi.ErrAnswer) {
		return reasonAnswer, nbd.Refuse(nbd.ErrPolicy, "xapi's answer cannot be understood", err)
	}
	return reasonXapi, nbd.Refuse(nbd.ErrPolicy, "xapi unreachable", err)
}

// xapiRefusal is refusal for xapi's own errors.
func xapiRefusal(xe *xapi.Error, err error) (reason string, answer error) {
	class := ""
	if len(xe.Params) > 0 {
		class = xe.Params[0]
	}
	gone := xe.Code == xapi.UUIDInvalid || xe.Code == xapi.HandleInvalid
	switch {
	case xe.NotReady():
		return reasonNotYet, nbd.Refuse(nbd.ErrPolicy, notYet, err)
	case xapi.SessionEnded(xe):
		return reasonSession, nbd.Refuse(nbd.ErrPolicy, sessionRejected(err), err)
	case xe.Code == xapi.RBACPermissionDenied:
		return reasonRole, nbd.Refuse(nbd.ErrPolicy, "missing permission "+class, err)
	case gone && class == "VDI":
		return reasonNoVDI, nbd.Refuse(nbd.ErrUnknownExport, "no such VDI", err)
	}
	text := fmt.Sprintf("the VDI cannot be plugged: %s", xe.Code)
	if len(xe.Params) > 0 {
		text += fmt.Sprintf(" %q", xe.Params)
	}
	// The text has the whole error of xapi but for the name of the call, which the log gets.
	return reasonPlug, nbd.Refuse(nbd.ErrUnknownExport, text, errors.New("answer to "+xe.Method))
}

func sessionRejected(err error) string {
	var xe *xapi.Error
	if errors.As(err, &xe) {
		return fmt.Sprintf("session rejected by xapi (%s)", xe.Code)
	}
	return "session rejected by xapi"
}
