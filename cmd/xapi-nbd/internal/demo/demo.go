package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/logging"
	"xapi-nbd/cmd/xapi-nbd/internal/service"
	"xapi-nbd/internal/testcert"
	"xapi-nbd/nbd/client"
	"xapi-nbd/xapi/xapitest"
)

// world is the state of a demo.
type world struct {
	out, err io.Writer
	dir      string
	host     *xapitest.Host
	network  string // uuid
	vdi      string // uuid of the disk
	first    string // uuid of its snapshot that is copied
	second   string // uuid of its snapshot after the changes
	session  string // a simulated one, in the export names
	service  *service.Service
	trust    *testcert.Files
}

// Run sets up the simulated host, copies the disk, prints the VBDs that are left, and goes
// on serving unless once is set.
func Run(ctx context.Context, out, errOut io.Writer, once bool) (err error) {
	dir, err := os.MkdirTemp("", "xapi-nbd-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	w := &world{out: out, err: errOut, dir: dir}
	if err := w.startHost(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.host.Close()) }()
	if err := w.newService(ctx); err != nil {
		return err
	}
	stop, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- w.service.Run(stop, context.Background()) }()

	err = w.play(ctx)
	if err == nil && !once {
		err = w.serveOn(ctx)
	}
	cancel(errors.New("the demo is over"))
	if err := errors.Join(err, <-ended); err != nil {
		return err
	}
	return w.assertNothingLeft()
}

// startHost makes the simulated host, its network and its disk.
func (w *world) startHost() (err error) {
	if w.host, err = xapitest.Start(xapitest.Config{Dir: filepath.Join(w.dir, "host"), Style: xapitest.StyleSM}); err != nil {
		return err
	}
	w.network = w.host.AddNetwork("nbd")
	w.session = w.host.NewSession(xapitest.RoleVMAdmin)
	if err := w.makeDisk(); err != nil {
		return errors.Join(err, w.host.Close())
	}
	w.say("A simulated XenServer host with one disk of 64 MiB, a FAT16 file system in a VHD image,")
	w.say("with changed block tracking, and a snapshot of it:")
	w.say("  VDI      %s", w.vdi)
	w.say("  snapshot %s", w.first)
	return nil
}

// newService makes the service as an operator would, by its configuration.
func (w *world) newService(ctx context.Context) error {
	var err error
	if w.trust, err = testcert.NewFiles(w.dir); err != nil {
		return err
	}
	cfg := config.Default()
	cfg.Listen = []string{"127.0.0.1:0"}
	cfg.Certfile = w.trust.Server
	cfg.XapiSocket = w.host.Socket()
	cfg.Inventory = w.host.Inventory()
	cfg.DeviceDir = w.host.DeviceDir()
	cfg.StateDir = filepath.Join(w.dir, "state")
	cfg.LogLevel = "warning"
	log, _ := logging.New(new(slog.LevelVar), cfg, w.err)
	w.service, err = service.New(ctx, service.Options{Config: cfg, Log: log})
	return err
}

func (w *world) addr() string { return w.service.Addrs()[0].String() }

// play makes a full copy, changes the disk, updates the copy, and prints the VBDs that are
// left.
func (w *world) play(ctx context.Context) error {
	w.say("The service, on %s with TLS, is asked for", w.addr())
	w.say("  %s", w.exportName(w.first))
	if err := w.fullCopy(ctx); err != nil {
		return err
	}
	if err := w.changeDisk(); err != nil {
		return err
	}
	if err := w.increment(ctx); err != nil {
		return err
	}
	w.showEvents()
	return nil
}

func (w *world) exportName(vdi string) string { return w.host.ExportName(vdi, w.session) }

// connect opens an export with a metadata context. It waits until the service has met the
// host, which takes a moment.
func (w *world) connect(ctx context.Context, vdi, metaContext string) (*client.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	select {
	case <-w.service.Ready():
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	client, err := client.Dial(ctx, "tcp", w.addr(), &client.Config{TLSConfig: w.trust.Client, MetaContexts: []string{metaContext}})
	if err != nil {
		return nil, err
	}
	conn, err := client.Go(ctx, w.exportName(vdi))
	if err != nil {
		return nil, errors.Join(err, client.Abort())
	}
	return conn, nil
}

// waitRemoved waits until the host has no VBD any more.
func (w *world) waitRemoved(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := w.host.Wait(ctx, func(vbds []xapitest.VBD) bool { return len(vbds) == 0 }); err != nil {
		return fmt.Errorf("the VBD was not removed: %w", err)
	}
	return nil
}

// showEvents prints the events in the life of each VBD.
func (w *world) showEvents() {
	w.say("\nThe life of the VBDs that the service made for it:")
	events := w.host.Events()
	for _, e := range events {
		w.say("  %6.0f ms  %s  %s", float64(e.Time.Sub(events[0].Time).Microseconds())/1000, e.VBD, e.Change)
	}
}

// assertNothingLeft returns an error if the host has VBDs left.
func (w *world) assertNothingLeft() error {
	if left := len(w.host.VBDs()); left > 0 {
		return fmt.Errorf("VBDs left on the host: %d", left)
	}
	w.say("VBDs left on the host: 0")
	return nil
}

func (w *world) say(format string, args ...any) { fmt.Fprintf(w.out, format+"\n", args...) }
