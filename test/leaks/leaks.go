// Package leaks ends the tests of a package with a look for goroutines that they
// have left behind.
package leaks

import (
	"testing"
	"time"

	"go.uber.org/goleak"
)

// patience is how long goroutines may take to end after the last test. goleak's own
// is below half a second, in which a busy machine need not let them run.
const patience = 30 * time.Second

// Main is for TestMain: it runs the tests and exits, with an error if one of them
// failed or goroutines are left after half a minute.
func Main(m *testing.M, options ...goleak.Option) {
	goleak.VerifyTestMain(patient{m}, options...)
}

// patient runs tests and waits for what they leave behind.
type patient struct{ tests goleak.TestingM }

func (p patient) Run() int {
	code := p.tests.Run()
	for begin := time.Now(); code == 0 && time.Since(begin) < patience; {
		if goleak.Find() == nil {
			break
		}
	}
	return code
}
