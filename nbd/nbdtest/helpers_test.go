package nbdtest_test

import (
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
)

// failures is a testing.TB that records failures instead of failing, to test checks.
type failures struct {
	testing.TB
	mu    sync.Mutex // guards texts
	texts []string
}

func (f *failures) Helper() {}

func (f *failures) Error(args ...any) { f.add(fmt.Sprint(args...)) }

func (f *failures) Errorf(format string, args ...any) { f.add(fmt.Sprintf(format, args...)) }

func (f *failures) Fatal(args ...any) {
	f.add(fmt.Sprint(args...))
	runtime.Goexit()
}

func (f *failures) Fatalf(format string, args ...any) {
	f.add(fmt.Sprintf(format, args...))
	runtime.Goexit()
}

func (f *failures) add(s string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.texts = append(f.texts, s)
}

// failuresOf runs check and returns its failures.
func failuresOf(t *testing.T, check func(t testing.TB)) string {
	t.Helper()
	f := &failures{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		check(f)
	}()
	<-done
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.texts, "\n")
}
