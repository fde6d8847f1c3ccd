// SPDX-License-Identifier: GPL-2.0

// Two MPI ranks in an ordinary Go program. Rank 0 allocates a buffer for each transfer
// and drops it afterwards. The garbage collector finds it, gives its memory back to the
// kernel by system calls of Go's own, and the next buffer is at the same address. The
// output is a line for each direction, as of stale.c.
package main

/*
#include <mpi.h>

static void start(int *rank, int *size)
{
	int provided;

	MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided);
	MPI_Comm_rank(MPI_COMM_WORLD, rank);
	MPI_Comm_size(MPI_COMM_WORLD, size);
}

static void transmit(void *buf, int size, int to)
{
	MPI_Send(buf, size, MPI_BYTE, to, 0, MPI_COMM_WORLD);
}

static void receive(void *buf, int size, int from)
{
	MPI_Recv(buf, size, MPI_BYTE, from, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
}
*/
import "C"

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"unsafe"
)

const (
	size   = 1 << 20
	rounds = 20
)

// data is different for each round, in each byte.
func data(round, i int) byte { return byte(i*7 + i>>8 + round) }

func fill(buf []byte, round int) {
	for i := range buf {
		buf[i] = data(round, i)
	}
}

func right(buf []byte, round int) bool {
	for i := range buf {
		if buf[i] != data(round, i) {
			return false
		}
	}
	return true
}

func send(buf []byte, to int)      { C.transmit(unsafe.Pointer(&buf[0]), C.int(len(buf)), C.int(to)) }
func receive(buf []byte, from int) { C.receive(unsafe.Pointer(&buf[0]), C.int(len(buf)), C.int(from)) }

func verdict(direction string, wrong []int) {
	fmt.Printf("garbage_collector %s %dKiB ", direction, size/1024)
	if len(wrong) == 0 {
		fmt.Println("right")
	} else {
		fmt.Printf("wrong: %d of %d transfers, from number %d on\n", len(wrong), rounds, wrong[0])
	}
}

func main() {
	runtime.LockOSThread()
	var rank, ranks C.int
	C.start(&rank, &ranks)
	if ranks != 2 {
		fmt.Fprintln(os.Stderr, "collect: needs two ranks")
		os.Exit(2)
	}
	if rank == 1 {
		buf, answer := make([]byte, size), make([]byte, 1)
		for round := 1; round <= rounds; round++ {
			fill(buf, round+128)
			receive(buf, 0)
			answer[0] = 0
			if right(buf, round) {
				answer[0] = 1
			}
			send(answer, 0)
		}
		for round := 1; round <= rounds; round++ {
			fill(buf, round)
			send(buf, 0)
		}
	} else {
		var sent, received []int
		for round := 1; round <= rounds; round++ {
			buf, answer := make([]byte, size), make([]byte, 1)
			fill(buf, round)
			send(buf, 1)
			receive(answer, 1)
			if answer[0] != 1 {
				sent = append(sent, round)
			}
			buf = nil
			debug.FreeOSMemory()
		}
		for round := 1; round <= rounds; round++ {
			buf := make([]byte, size)
			fill(buf, round+128)
			receive(buf, 1)
			if !right(buf, round) {
				received = append(received, round)
			}
			buf = nil
			debug.FreeOSMemory()
		}
		verdict("send", sent)
		verdict("receive", received)
		fmt.Println("# end")
	}
	C.MPI_Finalize()
}
