package main

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"testing"
)

// childEnv makes this test binary be the program: tests start it as a process
// of its own, which they can kill.
const childEnv = "XAPI_NBD_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		switch {
		case os.Getenv(crashEnv) != "":
			go panicWhenAsked()
		case os.Getenv("LISTEN_FDS") == "":
			go answerMemoryQuestions()
		default:
			// Who is meant is known only now; descriptor 3 is a socket.
			os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
		}
		main()
	}
	os.Exit(m.Run())
}

// answerMemoryQuestions writes a line about this process to descriptor 4 for
// each byte from descriptor 3, after a collection: heap in use in bytes.
func answerMemoryQuestions() {
	questions, answers := os.NewFile(3, "questions"), os.NewFile(4, "answers")
	var b [1]byte
	for {
		// Without such descriptors, or at the end of the pipe, nobody asks.
		if n, err := questions.Read(b[:]); n == 0 || err != nil {
			return
		}
		runtime.GC()
		debug.FreeOSMemory()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		fmt.Fprintln(answers, strconv.FormatUint(stats.HeapInuse, 10))
	}
}
