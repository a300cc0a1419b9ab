package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// copyShape is how nbdcopy reads a disk: so many connections, with so many
// requests in flight on each, of so many bytes.
type copyShape struct {
	conns, requests int
	size            int64
}

// nbdcopy copies an export and returns how long that took. By default it has
// no more than 16 MiB in flight on a connection, and fewer requests than it was
// told to.
func (b *bench) nbdcopy(ctx context.Context, s *server, addr string, shape copyShape, to string) (time.Duration, error) {
	argv := []string{
		b.programs["nbdcopy"],
		fmt.Sprintf("--connections=%d", shape.conns),
		fmt.Sprintf("--requests=%d", shape.requests),
		fmt.Sprintf("--request-size=%d", shape.size),
		fmt.Sprintf("--queue-size=%d", max(int64(shape.requests)*shape.size, 16*mib)),
		s.uri(addr), to,
	}
	_, port, _ := strings.Cut(addr, ":")
	if to == discard {
		b.log.note(clientCommand, b.shown(argv, port))
	}
	return b.client(ctx, argv)
}

// discard is nbdcopy's word for nowhere.
const discard = "null:"

// client runs a foreign program to its end and takes the time.
func (b *bench) client(ctx context.Context, argv []string) (time.Duration, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = b.dir // fio leaves files
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	begin := time.Now()
	err := cmd.Run()
	took := time.Since(begin)
	switch {
	case ctx.Err() != nil:
		return took, context.Cause(ctx)
	case err != nil:
		return took, fmt.Errorf("%s: %w: %q", filepath.Base(argv[0]), err, out.Bytes()[:min(out.Len(), maxOutput)])
	}
	return took, nil
}

// copyAway copies the whole disk to nowhere.
func (b *bench) copyAway(ctx context.Context, s *server, addr string, shape copyShape) (sample, error) {
	size, err := b.imageSize(ctx, s)
	if err != nil {
		return sample{}, err
	}
	took, err := b.nbdcopy(ctx, s, addr, shape, discard)
	return sample{Bytes: size, Seconds: took.Seconds()}, err
}

// imageSize is the size of what the server serves.
func (b *bench) imageSize(ctx context.Context, s *server) (int64, error) {
	path, err := b.images.plain(ctx, s.env.image)
	if err != nil {
		return 0, err
	}
	fi, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

// copyOverLink is copyAway at a distance.
func (b *bench) copyOverLink(ctx context.Context, s *server, shape copyShape, delay time.Duration) (sample, error) {
	r, err := startRelay(s.addr, delay)
	if err != nil {
		return sample{}, err
	}
	defer r.close()
	return b.copyAway(ctx, s, r.addr(), shape)
}

// verify compares what clients get of a server with the image, in large reads
// and small ones, before anything is measured: what is wrong may well be fast.
func (b *bench) verify(ctx context.Context, s *server) error {
	if s.inProcess() {
		return nil
	}
	want, err := b.images.plain(ctx, s.env.image)
	if err != nil {
		return err
	}
	if b.programs["nbdcopy"] != "" {
		for _, shape := range []copyShape{copyShapes[0], copyShapes[len(copyShapes)-1]} {
			if err := b.verifyCopy(ctx, s, shape, want); err != nil {
				return fmt.Errorf("nbdcopy with %d connections: %w", shape.conns, err)
			}
		}
	}
	if err := verifyReads(ctx, s, want); err != nil {
		return fmt.Errorf("reads at random: %w", err)
	}
	return b.noteCipher(ctx, s)
}

func (b *bench) verifyCopy(ctx context.Context, s *server, shape copyShape, want string) (err error) {
	got := filepath.Join(b.dir, "copy")
	defer func() {
		if gone := os.Remove(got); err == nil {
			err = gone
		}
	}()
	if _, err := b.nbdcopy(ctx, s, s.addr, shape, got); err != nil {
		return err
	}
	return sameContent(got, want)
}

// verifyReads reads pieces of all the sizes that are measured, many at a time,
// at offsets that suit nobody.
func verifyReads(ctx context.Context, s *server, want string) error {
	const workers, reads = 16, 8
	file, err := os.Open(want)
	if err != nil {
		return err
	}
	defer file.Close()
	conn, err := s.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	group, ctx := errgroup.WithContext(ctx)
	for worker := range workers {
		group.Go(func() error {
			chance := rand.New(rand.NewPCG(3, uint64(worker)))
			got, want := make([]byte, 2*mib), make([]byte, 2*mib)
			for range reads {
				n := []int64{512, 4 * kib, 64 * kib, 2*mib - 512}[chance.IntN(4)]
				off := chance.Int64N((conn.Size()-n)/512+1) * 512
				if err := conn.Read(ctx, got[:n], off); err != nil {
					return err
				}
				if _, err := file.ReadAt(want[:n], off); err != nil {
					return err
				}
				if !bytes.Equal(got[:n], want[:n]) {
					return fmt.Errorf("%d bytes from %d on differ", n, off)
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// noteCipher notes what the server and GnuTLS, which all the clients use,
// agree on: programs may prefer differently, and ciphers differ in price.
func (b *bench) noteCipher(ctx context.Context, s *server) error {
	if s.tls == nil || b.programs["nbdinfo"] == "" {
		return nil
	}
	cmd := exec.CommandContext(ctx, b.programs["nbdinfo"], "--size", s.uri(s.addr))
	cmd.Env = append(os.Environ(), "LIBNBD_DEBUG=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	_, rest, ok := strings.Cut(string(out), "connection is using TLS: ")
	if ok {
		cipher, _, _ := strings.Cut(rest, "\n")
		cipher, _, _ = strings.Cut(cipher, " kTLS")
		b.log.note(ciphers, s.name+": "+cipher)
	}
	return nil
}
