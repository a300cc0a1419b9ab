package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"xapi-nbd/nbd"
	nbdtls "xapi-nbd/tls"
	"xapi-nbd/vdi/blockdev"
)

// writeCases copy fileImage onto a disk that has data already, and flush it. Ours is nbd-tool
// for a file, and for a loop device the way of the service: package blockdev, with O_DIRECT.
func writeCases() []testCase {
	var cases []testCase
	for _, target := range []imageKind{targetImage, targetLoopImage} {
		for _, tls := range []bool{false, true} {
			e := env{image: target, tls: tls}
			mode := map[bool]string{false: "clear", true: "tls"}[tls]
			for _, shape := range copyShapes {
				cases = append(cases, testCase{
					name: fmt.Sprintf("write/%s/%s/%s", target, mode, shape), env: e, client: "nbdcopy",
					run: func(ctx context.Context, b *bench, s *server) (sample, error) { return b.copyTo(ctx, s, shape) },
				})
			}
		}
	}
	return cases
}

// writes reports whether the image is there to be written.
func (i imageKind) writes() bool { return i == targetImage || i == targetLoopImage }

// copyTo has nbdcopy write a whole disk, and flush it.
func (b *bench) copyTo(ctx context.Context, s *server, shape copyShape) (sample, error) {
	source, err := b.images.path(ctx, fileImage)
	if err != nil {
		return sample{}, err
	}
	argv := append(b.nbdcopyArgs(shape), "--flush", source, s.uri(s.addr))
	took, err := b.runClient(ctx, argv...)
	return sample{Bytes: b.images.size, Seconds: took.Seconds()}, err
}

// verifyWritten writes the disk by way of a server, in each of the shapes, and compares the file
// below it.
func (b *bench) verifyWritten(ctx context.Context, s *server, shapes []copyShape) error {
	source, err := b.images.path(ctx, fileImage)
	if err != nil {
		return err
	}
	target := b.images.paths[targetImage]
	if err := zeroFile(target); err != nil {
		return err
	}
	for _, shape := range shapes {
		if _, err := b.copyTo(ctx, s, shape); err != nil {
			return err
		}
		if err := sameFiles(source, target); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

// zeroFile overwrites a file with zeroes.
func zeroFile(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	for off := int64(0); err == nil && off < size; off += mib {
		_, err = f.WriteAt(make([]byte, min(mib, size-off)), off)
	}
	return errors.Join(err, f.Sync())
}

func sameFiles(source, target string) error {
	a, err := os.Open(source)
	if err != nil {
		return err
	}
	defer a.Close()
	b, err := os.Open(target)
	if err != nil {
		return err
	}
	defer b.Close()
	want, got := make([]byte, mib), make([]byte, mib)
	for off := int64(0); ; off += mib {
		n, err := a.ReadAt(want, off)
		m, _ := b.ReadAt(got, off)
		if m != n || !bytes.Equal(want[:n], got[:n]) {
			return fmt.Errorf("it has written wrong bytes between %d and %d", off, off+mib)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// writableDevice is a device of package blockdev, as the service exports it. Its connections
// share it.
type writableDevice struct{ *blockdev.Device }

func (writableDevice) Close() error { return nil }

// serveDevice is the subcommand that serves a block device for writing, until ctx ends.
func serveDevice(ctx context.Context, args []string, errOut io.Writer) error {
	f := flag.NewFlagSet("serve-device", flag.ContinueOnError)
	f.SetOutput(errOut)
	listen := f.String("listen", host+":0", "`address`")
	pair := f.String("certfile", "", "`file` with key and certificate; makes TLS mandatory")
	if err := f.Parse(args); err != nil {
		return err
	}
	d, err := blockdev.Open(ctx, f.Arg(0), blockdev.Options{Write: true})
	if err != nil {
		return err
	}
	defer d.Close()
	s := &nbd.Server{Exporter: nbd.ExporterFunc(func(context.Context, nbd.Peer, string) (nbd.Device, error) {
		return writableDevice{d}, nil
	})}
	if *pair != "" {
		r, err := nbdtls.NewReloader(*pair, nil)
		if err != nil {
			return err
		}
		s.TLSConfig = nbdtls.ServerConfig(r)
		s.TLSPolicy = func(context.Context, nbd.Peer) (nbd.TLSMode, error) { return nbd.ForcedTLS, nil }
	}
	return serve(ctx, s, *listen)
}
