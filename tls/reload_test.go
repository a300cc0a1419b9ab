package tls

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// logged returns a logger, and a function that counts the lines with a text.
func logged() (*slog.Logger, func(text string) int) {
	var mu sync.Mutex
	var buf bytes.Buffer
	log := slog.New(slog.NewTextHandler(writerFunc(func(b []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return buf.Write(b)
	}), nil))
	return log, func(text string) int {
		mu.Lock()
		defer mu.Unlock()
		return strings.Count(buf.String(), text)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func served(t *testing.T, r *Reloader) string {
	t.Helper()
	cert, err := r.GetCertificate(nil)
	if err != nil {
		t.Fatalf("GetCertificate: %v", err)
	}
	return cert.Leaf.Subject.CommonName
}

func TestReloaderFollowsRename(t *testing.T) {
	key := pkcs8(t, ecKey())
	path := writeFile(t, join(key, validCert(ecKey(), "first")))
	log, count := logged()
	r, err := NewReloader(path, log)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if got := served(t, r); got != "first" {
			t.Errorf("got %q, want first", got)
		}
	}
	replace(t, path, join(key, validCert(ecKey(), "second")))
	if got := served(t, r); got != "second" {
		t.Errorf("after the rename got %q, want second", got)
	}
	if got := count("certificate loaded"); got != 2 {
		t.Errorf("logged %d loads, want 2: an unchanged file is not read again", got)
	}
}

func TestReloaderKeepsLastGood(t *testing.T) {
	key := pkcs8(t, ecKey())
	path := writeFile(t, join(key, validCert(ecKey(), "good")))
	log, count := logged()
	r, err := NewReloader(path, log)
	if err != nil {
		t.Fatal(err)
	}
	steps := []struct {
		name   string
		change func()
		errors int // logged so far
	}{
		{"garbage", func() { replace(t, path, []byte("garbage")) }, 1},
		{"another bad file", func() { replace(t, path, key) }, 2},
		{"gone", func() { os.Remove(path) }, 3},
		{"a directory", func() { os.Mkdir(path, 0o700) }, 4},
		{"gone again", func() { os.Remove(path) }, 5},
	}
	for _, s := range steps {
		s.change()
		for range 3 {
			if got := served(t, r); got != "good" {
				t.Errorf("%s: got %q, want the last good one", s.name, got)
			}
			if err := r.Available(); err != nil {
				t.Errorf("%s: Available: %v", s.name, err)
			}
		}
		if got := count("still serving the previous one"); got != s.errors {
			t.Errorf("%s: %d errors logged so far, want %d: once per change", s.name, got, s.errors)
		}
	}
	replace(t, path, join(key, validCert(ecKey(), "better")))
	if got := served(t, r); got != "better" {
		t.Errorf("got %q, want better", got)
	}
}

func TestReloaderWithoutCertificate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "xapi-ssl.pem")
	log, count := logged()
	r, err := NewReloader(path, log)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("NewReloader: got %v, want %v", err, fs.ErrNotExist)
	}
	if err := r.Available(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Available: got %v, want %v", err, fs.ErrNotExist)
	}
	if cert, err := r.GetCertificate(nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("GetCertificate: got %v, %v, want %v", cert, err, fs.ErrNotExist)
	}
	if got := count("cannot be loaded"); got != 1 {
		t.Errorf("logged %d errors, want 1", got)
	}
	replace(t, path, join(pkcs8(t, ecKey()), validCert(ecKey(), "here")))
	if err := r.Available(); err != nil {
		t.Errorf("Available once the file exists: %v", err)
	}
}

func TestReloaderWarnsOfValidity(t *testing.T) {
	key := pkcs8(t, ecKey())
	tests := []struct {
		name     string
		notAfter time.Time
		want     string
	}{
		{"expired", time.Now().Add(-time.Hour), "has expired"},
		{"future", time.Now().Add(24 * time.Hour), "not valid yet"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			log, count := logged()
			r, err := NewReloader(writeFile(t, join(key, certFor(ecKey(), "host", tt.notAfter))), log)
			if err != nil {
				t.Fatalf("NewReloader: %v", err)
			}
			served(t, r)
			if got := count(tt.want); got != 1 {
				t.Errorf("%q logged %d times, want 1", tt.want, got)
			}
		})
	}
}

// TestReloaderConcurrently: while the file is being replaced every caller gets a certificate.
func TestReloaderConcurrently(t *testing.T) {
	key := pkcs8(t, ecKey())
	path := writeFile(t, join(key, validCert(ecKey(), "host0")))
	r, err := NewReloader(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := r.GetCertificate(nil); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range 20 {
		name := fmt.Sprintf("host%d", i+1)
		replace(t, path, join(key, validCert(ecKey(), name)))
		if got := served(t, r); got != name {
			t.Errorf("got %q, want %q", got, name)
		}
	}
	close(stop)
	wg.Wait()
}
