package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"xapi-nbd/auth"
	"xapi-nbd/nbd"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
)

// *vdi.Disk is a Device without knowing it.
var (
	_ nbd.Device     = (*vdi.Disk)(nil)
	_ nbd.BlockSizer = (*vdi.Disk)(nil)
	_ nbd.Describer  = (*vdi.Disk)(nil)
	_ nbd.Namer      = (*vdi.Disk)(nil)
	_ nbd.Mortal     = (*vdi.Disk)(nil)
	_ nbd.Ender      = (*vdi.Disk)(nil)
	_ nbd.FileBacked = (*vdi.Disk)(nil)
)

// exporter is the glue: an export name becomes an authorized session, and the
// session an attached VDI. In this order: nothing is plugged for a stranger.
type exporter struct {
	sessions *auth.Authorizer
	local    *xapi.Local
	rechecks *auth.Rechecker
	disks    *vdi.Manager
	ready    latch // xapi has answered
}

// Open implements nbd.Exporter.
func (e *exporter) Open(ctx context.Context, _ nbd.Peer, name string) (nbd.Device, error) {
	req, err := auth.ParseExportName(name)
	if err != nil {
		return nil, nbd.Refuse(nbd.ErrInvalid, err.Error(), nil)
	}
	if !e.ready.isOpen() {
		return nil, errNotYet
	}
	epoch, err := e.local.Epoch(ctx)
	if err != nil {
		return nil, refusal(err)
	}
	session, err := e.sessions.Authorize(ctx, req)
	if err != nil {
		return nil, refusal(err)
	}
	disk, err := e.disks.Attach(ctx, session, req.VDI)
	if err != nil {
		return nil, refusal(err)
	}
	return &watchedDisk{disk, e.rechecks.Watch(session, epoch, disk.Revoke)}, nil
}

// watchedDisk is a disk that is revoked when its client's session ends.
type watchedDisk struct {
	*vdi.Disk
	stopWatching func()
}

// Close implements nbd.Device.
func (d *watchedDisk) Close() error {
	d.stopWatching()
	return d.Disk.Close()
}

// refusal decides what a client learns of an error; the log gets all of it.
// It is the only place where the service's errors meet NBD's.
func refusal(err error) error {
	var (
		role  *auth.PermissionError
		limit *vdi.LimitError
		lost  *xapi.TransportError
		xe    *xapi.Error
	)
	switch {
	case errors.Is(err, auth.ErrSession):
		return nbd.Refuse(nbd.ErrPolicy, sessionRejected(err), err)
	case errors.As(err, &role):
		return nbd.Refuse(nbd.ErrPolicy, role.Error(), nil)
	case errors.As(err, &limit):
		return nbd.Refuse(nbd.ErrPolicy, limit.Error(), nil)
	case errors.Is(err, vdi.ErrStillAttaching):
		return nbd.Refuse(nbd.ErrUnknownExport, vdi.ErrStillAttaching.Error(), nil)
	case errors.Is(err, vdi.ErrLost):
		return nbd.Refuse(nbd.ErrUnknownExport, vdi.ErrLost.Error(), err)
	case errors.Is(err, vdi.ErrClosed):
		return nbd.Refuse(nbd.ErrShutdown, "", err)
	case errors.As(err, &lost):
		return nbd.Refuse(nbd.ErrPolicy, "xapi unreachable", err)
	case errors.As(err, &xe):
		return xapiRefusal(xe, err)
	}
	return err
}

// xapiRefusal is refusal for xapi's own errors.
func xapiRefusal(xe *xapi.Error, err error) error {
	class := ""
	if len(xe.Params) > 0 {
		class = xe.Params[0]
	}
	gone := xe.Code == xapi.UUIDInvalid || xe.Code == xapi.HandleInvalid
	switch {
	case xe.Code == xapi.SessionInvalid, gone && strings.EqualFold(class, "session"):
		return nbd.Refuse(nbd.ErrPolicy, sessionRejected(err), err)
	case xe.Code == xapi.RBACPermissionDenied:
		return nbd.Refuse(nbd.ErrPolicy, "missing permission "+class, err)
	case gone && class == "VDI":
		return nbd.Refuse(nbd.ErrUnknownExport, "no such VDI", err)
	}
	text := fmt.Sprintf("the VDI cannot be plugged: %s", xe.Code)
	if len(xe.Params) > 0 {
		text += fmt.Sprintf(" %q", xe.Params)
	}
	return nbd.Refuse(nbd.ErrUnknownExport, text, err)
}

func sessionRejected(err error) string {
	var xe *xapi.Error
	if errors.As(err, &xe) {
		return fmt.Sprintf("session rejected by xapi (%s)", xe.Code)
	}
	return "session rejected by xapi"
}
