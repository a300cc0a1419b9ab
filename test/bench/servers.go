package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"xapi-nbd/internal/testcert"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// The names of servers in tables, besides "new" and "old".
const (
	ours   = "ours"
	nbdkit = "nbdkit"
	qemu   = "qemu-nbd"
)

const (
	host       = "127.0.0.1" // everything listens there
	serverName = "localhost"

	startTimeout = 30 * time.Second      // for a server to answer
	retryPause   = 10 * time.Millisecond // between two attempts to reach it
	stopTimeout  = 10 * time.Second      // for a server to end after SIGTERM
	maxOutput    = 8 << 10               // bytes kept of the output of a process
)

// kind is a program that serves. It runs with its defaults, except for settings without
// which it could not be compared.
type kind struct {
	name string
	argv func(l launch) []string
	host *sparseHost // of the service; nil for all other servers
}

// launch is the configuration of one server.
type launch struct {
	env         env
	image, port string
}

// kinds returns the servers of an environment: ours first, then the installed peers.
func (b *bench) kinds(e env) []kind {
	if isService(e.image) {
		return b.serviceKinds(e)
	}
	switch e.device {
	case copiedDevice:
		return b.copyKinds()
	case pausedDevice, mirroredDevice:
		return b.mirrorKinds(e)
	}
	var all []kind
	for _, build := range b.builds {
		all = append(all, kind{name: build.name, argv: func(l launch) []string { return b.oursArgs(build, l) }})
	}
	if b.opts.old != "" || e.device == stalledDevice {
		return all
	}
	peers := []kind{{name: nbdkit, argv: b.nbdkitArgs}}
	if e.device == plainDevice {
		peers = append(peers, kind{name: qemu, argv: func(l launch) []string { return b.qemuArgs(l, "raw") }})
	}
	for _, k := range peers {
		if b.programs[k.name] == "" {
			b.skip("%s: not installed", k.name)
			continue
		}
		all = append(all, k)
	}
	return all
}

func (b *bench) oursArgs(build build, l launch) []string {
	listen := host + ":" + l.port
	switch l.env.device {
	case slowDevice:
		return []string{build.bench, "serve-slow", "-listen", listen, l.image}
	case stalledDevice:
		return []string{build.bench, "serve-stalled", "-listen", listen, l.image}
	}
	argv := []string{build.tool, "serve"}
	switch l.env.image {
	case targetLoopImage:
		argv = []string{build.bench, "serve-device"}
	case targetImage:
		argv = append(argv, "--writable")
	}
	argv = append(argv, "--listen="+listen)
	if l.env.tls {
		argv = append(argv, "--certfile="+b.pairFile())
	}
	return append(argv, l.image)
}

func (b *bench) nbdkitArgs(l launch) []string {
	argv := []string{b.programs[nbdkit], "-f", "-i", host, "-p", l.port}
	if !l.env.image.writes() {
		argv = append(argv, "-r")
	}
	if l.env.tls {
		argv = append(argv, "--tls=require", "--tls-certificates="+b.dir)
	}
	if l.env.device == slowDevice {
		return append(argv, "--filter=delay", "file", l.image, fmt.Sprintf("rdelay=%dms", slowDelay.Milliseconds()))
	}
	return append(argv, "file", l.image)
}

func (b *bench) qemuArgs(l launch, format string) []string {
	// -e: it accepts no more connections than that.
	argv := []string{b.programs[qemu], "-e", fmt.Sprint(idleConns + 16), "-t", "-f", format, "-b", host, "-p", l.port}
	switch {
	case !l.env.image.writes():
		argv = append(argv, "-r")
	case l.env.image == targetLoopImage:
		argv = append(argv, "--cache=none") // O_DIRECT
	}
	if l.env.tls {
		argv = append(argv, "--object", "tls-creds-x509,id=tls0,endpoint=server,verify-peer=no,dir="+b.dir, "--tls-creds=tls0")
	}
	return append(argv, l.image)
}

func (b *bench) pairFile() string { return filepath.Join(b.dir, "pair.pem") }

// writeCertificates writes a server's certificate in the forms that the programs read:
// GnuTLS's names, and one file with key and certificate. The keys are RSA with 2048 bits,
// as on a XenServer host. It returns the CA.
func writeCertificates(dir string) (*testcert.Cert, error) {
	caKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	ca := testcert.Sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "benchmark CA"},
		IsCA:    true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, caKey, nil)
	template := testcert.Server(serverName, host)
	template.IsCA, template.KeyUsage = false, x509.KeyUsageDigitalSignature|x509.KeyUsageKeyEncipherment
	cert := testcert.Sign(template, key, ca)
	return ca, errors.Join(cert.WriteFolder(dir, "server", ca), cert.WriteServerFile(filepath.Join(dir, "pair.pem")))
}

// server is a running server. Its methods may be called concurrently.
type server struct {
	kind
	env    env
	addr   string
	tls    *tls.Config // a client's; nil in the clear
	certs  string      // a folder with the CA that clients trust
	cmd    *exec.Cmd
	done   chan struct{}
	output *output
}

// uri returns a URI for libnbd's programs. addr is the server's own, or that of a relay.
func (s *server) uri(addr string) string {
	if s.tls == nil {
		return "nbd://" + addr + s.exportPath()
	}
	return "nbds://" + addr + s.exportPath() + "?tls-certificates=" + s.certs
}

// ended reports whether the server's process has ended.
func (s *server) ended() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

var (
	errUnfit = errors.New("not fit for comparison") // another attempt does not help
	errEnded = errors.New("it ended")
)

// start starts a server and returns when it answers. If
// another program takes the chosen port first it tries again.
func (b *bench) start(ctx context.Context, k kind, e env) (s *server, err error) {
	image, err := b.imagePath(ctx, k, e)
	if err != nil {
		return nil, err
	}
	for range 3 {
		s, err = b.startOnce(ctx, k, launch{env: e, image: image})
		if !errors.Is(err, errEnded) || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", k.name, err)
	}
	return s, nil
}

// imagePath returns the file or device that a server opens; the service opens that of its
// host.
func (b *bench) imagePath(ctx context.Context, k kind, e env) (string, error) {
	switch {
	case k.host != nil:
		return "", nil
	case isService(e.image):
		return b.qcow2Of(ctx, e.image)
	}
	return b.images.path(ctx, e.image)
}

func (b *bench) startOnce(ctx context.Context, k kind, l launch) (*server, error) {
	s := &server{kind: k, env: l.env, certs: b.dir, done: make(chan struct{}), output: &output{}}
	listener, err := net.Listen("tcp", host+":0")
	if err != nil {
		return nil, err
	}
	s.addr = listener.Addr().String()
	_, l.port, _ = net.SplitHostPort(s.addr)
	if err := listener.Close(); err != nil {
		return nil, err
	}
	if l.env.tls {
		s.tls = b.cert.ClientConfig(serverName)
	}
	argv := k.argv(l)
	s.cmd = exec.Command(argv[0], argv[1:]...)
	s.cmd.Dir = b.dir
	s.cmd.Stdout, s.cmd.Stderr = s.output, s.output
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { // ends with the process
		_ = s.cmd.Wait()
		close(s.done)
	}()
	allowFiles(s.cmd.Process.Pid)
	if err := s.await(ctx); err != nil {
		s.stop()
		return nil, fmt.Errorf("%w; it printed: %q", err, s.output.String())
	}
	return s, nil
}

// await tries until the server answers.
func (s *server) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, errors.New("it does not answer"))
	defer cancel()
	for {
		err := s.answers(ctx)
		if s.ended() { // also when another program answered
			return errEnded
		}
		if err == nil || errors.Is(err, errUnfit) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-s.done:
		case <-time.After(retryPause):
		}
	}
}

// answers negotiates. It refuses a server that does not offer several connections, because
// nbdcopy would use one and not say so.
func (s *server) answers(ctx context.Context) error {
	conn, err := s.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	if conn.Info().Flags&wire.FlagCanMultiConn == 0 {
		return fmt.Errorf("%w: it does not offer several connections", errUnfit)
	}
	return nil
}

// dial opens the export with our own client. The caller closes the connection.
func (s *server) dial(ctx context.Context) (*client.Conn, error) {
	return s.dialAs(ctx, client.Config{})
}

// dialAs is dial with another configuration.
func (s *server) dialAs(ctx context.Context, cfg client.Config) (*client.Conn, error) {
	return s.dialTo(ctx, s.addr, cfg)
}

// dialTo is dialAs by way of a proxy.
func (s *server) dialTo(ctx context.Context, addr string, cfg client.Config) (*client.Conn, error) {
	export := ""
	if s.host != nil {
		export = s.host.export
	}
	return s.dialExport(ctx, addr, export, cfg)
}

func (s *server) dialExport(ctx context.Context, addr, export string, cfg client.Config) (*client.Conn, error) {
	cfg.TLSConfig = s.tls
	c, err := client.Dial(ctx, "tcp", addr, &cfg)
	if err != nil {
		return nil, err
	}
	conn, err := c.Go(ctx, export)
	if err != nil {
		return nil, errors.Join(err, c.Abort())
	}
	return conn, nil
}

// stop ends the server and waits until its process has ended.
func (s *server) stop() {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.done:
	case <-time.After(stopTimeout):
		_ = s.cmd.Process.Kill()
		<-s.done
	}
}

// output keeps the beginning of the output of a process.
type output struct {
	mu   sync.Mutex
	text strings.Builder
}

// Write implements io.Writer.
func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.text.Write(p[:min(len(p), max(maxOutput-o.text.Len(), 0))])
	return len(p), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}
