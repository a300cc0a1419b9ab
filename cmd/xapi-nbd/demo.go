package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"xapi-nbd/cmd/internal/sampledisk"
	"xapi-nbd/nbd/client"
	"xapi-nbd/xapi/xapitest"
)

func newDemoCommand() *cobra.Command {
	var once bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show it all in one process: a simulated XenServer host, the service and a client",
		Long: `Show it all in one process, on loopback, without root and without any other tool:
a simulated XenServer host with a sample disk, the service, and a client that
pulls the disk over TLS and compares it.

Without --once it goes on serving and prints command lines to try. Nothing here
touches a real xapi; the session in the export names is a simulated one.

Exit codes:
  0  done, or ended by SIGINT or SIGTERM
  1  it failed
  2  usage`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			if err := demo(ctx, cmd.OutOrStdout(), cmd.ErrOrStderr(), once); err != nil {
				return &exitError{1, err}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&once, "once", false, "exit after the disk was pulled and compared")
	return cmd
}

// demoWorld is what the demo plays in.
type demoWorld struct {
	out, err io.Writer
	dir      string
	host     *xapitest.Host
	network  string // uuid
	vdi      string // uuid
	export   string // its name, with the simulated session
	service  *service
	trust    *demoCertificate
}

// demo builds the world, pulls the disk, tells the VBD's story, and serves on
// unless once is set.
func demo(ctx context.Context, out, errOut io.Writer, once bool) (err error) {
	dir, err := os.MkdirTemp("", "xapi-nbd-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	w := &demoWorld{out: out, err: errOut, dir: dir}
	if err := w.startHost(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.host.Close()) }()
	if err := w.newService(ctx); err != nil {
		return err
	}
	stop, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- w.service.run(stop, context.Background()) }()

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

const demoDiskSize = 64 << 20

// startHost makes the simulated host, its network and its disk.
func (w *demoWorld) startHost() error {
	image := filepath.Join(w.dir, "sample.img")
	f, err := os.Create(image)
	if err != nil {
		return err
	}
	err = errors.Join(f.Truncate(demoDiskSize), sampledisk.Write(f, demoDiskSize, sampledisk.Sample()), f.Close())
	if err != nil {
		return err
	}
	if w.host, err = xapitest.Start(xapitest.Config{Dir: filepath.Join(w.dir, "host"), Style: xapitest.StyleSM}); err != nil {
		return err
	}
	w.network = w.host.AddNetwork("nbd")
	if w.vdi, err = w.host.AddVDI(xapitest.VDISpec{Image: image, NameLabel: "sample disk"}); err != nil {
		return errors.Join(err, w.host.Close())
	}
	w.export = w.host.ExportName(w.vdi, w.host.NewSession(xapitest.RoleVMAdmin))
	w.say("A simulated XenServer host with one disk of 64 MiB, a FAT16 file system:")
	w.say("  VDI %s", w.vdi)
	return nil
}

// newService makes the service as an operator would, by its configuration.
func (w *demoWorld) newService(ctx context.Context) error {
	var err error
	if w.trust, err = newDemoCertificate(w.dir); err != nil {
		return err
	}
	cfg := defaults()
	cfg.Listen = []string{"127.0.0.1:0"}
	cfg.Certfile = w.trust.serverFile
	cfg.XapiSocket = w.host.Socket()
	cfg.Inventory = w.host.Inventory()
	cfg.DeviceDir = w.host.DeviceDir()
	cfg.StateDir = filepath.Join(w.dir, "state")
	cfg.LogLevel = "warning"
	log, _ := newLogger(new(slog.LevelVar), cfg, w.err)
	w.service, err = newService(ctx, cfg, log, log)
	return err
}

func (w *demoWorld) addr() string { return w.service.listening.addrs()[0].String() }

// play pulls the disk over TLS, compares it, and shows what became of the VBD.
func (w *demoWorld) play(ctx context.Context) error {
	w.say("The service, on %s with TLS, asked for", w.addr())
	w.say("  %s", w.export)
	conn, err := w.connect(ctx)
	if err != nil {
		return err
	}
	pulled := filepath.Join(w.dir, "pulled.img")
	if err := w.pull(conn, pulled); err != nil {
		return errors.Join(err, conn.Close())
	}
	if err := conn.Close(); err != nil {
		return err
	}
	// Reading the image for its checksum would count as holding the device.
	if err := w.waitRemoved(ctx); err != nil {
		return err
	}
	if err := w.compare(pulled); err != nil {
		return err
	}
	w.tellStory()
	return nil
}

// connect waits until the service has met the host, which takes a moment.
func (w *demoWorld) connect(ctx context.Context) (*client.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	select {
	case <-w.service.ready:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	client, err := client.Dial(ctx, "tcp", w.addr(), &client.Config{TLSConfig: w.trust.client})
	if err != nil {
		return nil, err
	}
	conn, err := client.Go(ctx, w.export)
	if err != nil {
		return nil, errors.Join(err, client.Abort())
	}
	return conn, nil
}

// pull copies the export to a file, with a progress bar where somebody watches.
func (w *demoWorld) pull(conn *client.Conn, path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	bar := newProgress(w.err, conn.Size())
	_, err = io.CopyBuffer(io.MultiWriter(f, bar), io.NewSectionReader(conn, 0, conn.Size()), make([]byte, 2<<20))
	return errors.Join(err, bar.Close(), f.Close())
}

// newProgress is a progress bar on a terminal and silence elsewhere.
func newProgress(w io.Writer, size int64) *progressbar.ProgressBar {
	f, ok := w.(*os.File)
	visible := ok && term.IsTerminal(int(f.Fd()))
	return progressbar.NewOptions64(size,
		progressbar.OptionSetWriter(w), progressbar.OptionSetVisibility(visible),
		progressbar.OptionSetDescription("  pulling"), progressbar.OptionSetWidth(30),
		progressbar.OptionShowBytes(true), progressbar.OptionShowTotalBytes(true), progressbar.OptionUseIECUnits(true),
		progressbar.OptionOnCompletion(func() {
			if visible {
				fmt.Fprintln(w)
			}
		}))
}

// compare prints both checksums and fails unless they match.
func (w *demoWorld) compare(pulled string) error {
	want, err := fileSum(w.host.ImagePath(w.vdi))
	if err != nil {
		return err
	}
	got, err := fileSum(pulled)
	if err != nil {
		return err
	}
	w.say("Checksums (SHA-256):")
	w.say("  on the host  %s", want)
	w.say("  pulled       %s", got)
	if got != want {
		return errors.New("the checksums differ")
	}
	w.say("They match.")
	return nil
}

// waitRemoved waits until the host has no VBD any more.
func (w *demoWorld) waitRemoved(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := w.host.Wait(ctx, func(vbds []xapitest.VBD) bool { return len(vbds) == 0 }); err != nil {
		return fmt.Errorf("the VBD was not removed: %w", err)
	}
	return nil
}

// tellStory prints the VBD's life.
func (w *demoWorld) tellStory() {
	w.say("The life of the VBD that it took:")
	events := w.host.Events()
	for _, e := range events {
		w.say("  %6.0f ms  %s  %s", float64(e.Time.Sub(events[0].Time).Microseconds())/1000, e.VBD, e.What)
	}
}

// serveOn prints what can be tried and serves until a signal.
func (w *demoWorld) serveOn(ctx context.Context) error {
	w.host.SetPurposes(w.network, "insecure_nbd")
	port := w.service.listening.addrs()[0].(*net.TCPAddr).Port
	path := "/" + strings.NewReplacer("?", "%3F").Replace(w.export)
	clear := fmt.Sprintf("nbd://127.0.0.1:%d%s", port, path)
	secure := fmt.Sprintf("nbds://localhost:%d%s?tls-certificates=%s", port, path, w.trust.clientDir)
	w.say("\nStill serving; the network's purpose is insecure_nbd now, so the clear works too\n(after %v, for so long the old purpose is remembered). In another terminal:\n", purposeTTL)
	w.say("  nbdinfo '%s'", clear)
	w.say("  nbdcopy '%s' copy.img", clear)
	w.say("  qemu-img convert -p -f raw -O raw '%s' copy.img", clear)
	w.say("  nbdinfo '%s'      # with TLS", secure)
	w.say("\nCtrl-C ends it.")
	<-ctx.Done()
	return nil
}

// assertNothingLeft is the demo's last word.
func (w *demoWorld) assertNothingLeft() error {
	if left := len(w.host.VBDs()); left > 0 {
		return fmt.Errorf("VBDs left on the host: %d", left)
	}
	w.say("VBDs left on the host: 0")
	return nil
}

func (w *demoWorld) say(format string, args ...any) { fmt.Fprintf(w.out, format+"\n", args...) }

func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}
