package main

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"testing"
)

// childEnv makes this test binary run as the program, in a process that tests can kill.
const childEnv = "XAPI_NBD_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		switch {
		case os.Getenv("XAPI_NBD_HANDOVER") != "": // descriptor 3 belongs to the upgrade
		case os.Getenv(crashEnv) != "":
			go panicWhenAsked()
		case os.Getenv("LISTEN_FDS") == "":
			go answerMemoryQuestions()
		default:
			// The ID of this process is known only now; descriptor 3 is a socket.
			os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
		}
		main()
	}
	os.Exit(m.Run())
}

// answerMemoryQuestions writes the heap in use after a garbage collection, in bytes, as a line
// to descriptor 4, for each byte that it reads from descriptor 3.
func answerMemoryQuestions() {
	questions, answers := os.NewFile(3, "questions"), os.NewFile(4, "answers")
	var b [1]byte
	for {
		// The test passed no such descriptors, or has closed the pipe.
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
