// Package leaks checks at the end of the tests of a package that no goroutines are left.
package leaks

import (
	"testing"
	"time"

	"go.uber.org/goleak"
)

// timeout is the time that goroutines have to end after the last test. goleak's own is below
// half a second, too short for a busy machine.
const timeout = 30 * time.Second

// Main is for TestMain: it runs the tests and exits, with an error if one of them failed or
// goroutines are left after half a minute.
func Main(m *testing.M, options ...goleak.Option) {
	goleak.VerifyTestMain(patient{m}, options...)
}

// patient runs tests and waits until the goroutines that they left have ended.
type patient struct{ tests goleak.TestingM }

func (p patient) Run() int {
	code := p.tests.Run()
	for begin := time.Now(); code == 0 && time.Since(begin) < timeout; {
		if goleak.Find() == nil {
			break
		}
	}
	return code
}
