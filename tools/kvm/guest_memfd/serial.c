// SPDX-License-Identifier: GPL-2.0
/*
 * A 16550A UART: the guest's console.  Transmission takes no time, so the
 * transmitter is always empty.  All of it runs under vm->lock, but for write().
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <linux/serial_reg.h>

#include "vmm.h"

static bool rx_ready(const struct serial *s)
{
	return s->rx_head != s->rx_tail;
}

static u8 interrupt_id(const struct serial *s)
{
	if ((s->ier & UART_IER_RDI) && rx_ready(s))
		return UART_IIR_RDI;
	if ((s->ier & UART_IER_THRI) && s->thr_pending)
		return UART_IIR_THRI;
	return UART_IIR_NO_INT;
}

static void update_irq(struct vm *vm)
{
	struct serial *s = &vm->serial;
	struct kvm_irq_level irq = {
		.irq	= SERIAL_IRQ,
		.level	= interrupt_id(s) != UART_IIR_NO_INT,
	};

	if (irq.level == s->irq_level)
		return;

	s->irq_level = irq.level;
	if (ioctl(vm->fd, KVM_IRQ_LINE, &irq))
		call_failed("KVM_IRQ_LINE", NULL);
}

unsigned int serial_rx_room(struct vm *vm)
{
	struct serial *s = &vm->serial;

	return sizeof(s->rx) - (s->rx_head - s->rx_tail);
}

/* What there is no room for is lost, as in any UART. */
static void receive(struct vm *vm, u8 val)
{
	struct serial *s = &vm->serial;

	if (serial_rx_room(vm))
		s->rx[s->rx_head++ % sizeof(s->rx)] = val;
}

void serial_receive(struct vm *vm, const u8 *buf, unsigned int len)
{
	while (len--)
		receive(vm, *buf++);
	update_irq(vm);
}

/*
 * Without the lock: whoever has the other end of stdout may never read it, and
 * must not keep the VMM from ending.
 */
static void write_console(struct vm *vm, u8 val)
{
	struct pollfd console = { .fd = STDOUT_FILENO, .events = POLLOUT };

	pthread_mutex_unlock(&vm->lock);
	while (!vm->stopping && write(STDOUT_FILENO, &val, 1) != 1) {
		if (errno == EINTR)
			continue;
		if (errno == EAGAIN) {
			poll(&console, 1, 20);
			continue;
		}
		fprintf(stderr, "guest_memfd_vmm: console: %s\n", strerror(errno));
		vm_stop(vm, EXIT_VMM);
	}
	pthread_mutex_lock(&vm->lock);
}

static void transmit(struct vm *vm, u8 val)
{
	if (vm->serial.mcr & UART_MCR_LOOP)
		receive(vm, val);
	else
		write_console(vm, val);
}

void serial_out(struct vm *vm, unsigned int reg, u8 val)
{
	struct serial *s = &vm->serial;
	bool dlab = s->lcr & UART_LCR_DLAB;

	switch (reg) {
	case UART_TX:
		if (dlab) {
			s->dll = val;
			break;
		}
		transmit(vm, val);
		s->thr_pending = true;
		break;
	case UART_IER:
		if (dlab) {
			s->dlm = val;
			break;
		}
		/* An empty transmitter interrupts as soon as it is asked to. */
		if (~s->ier & val & UART_IER_THRI)
			s->thr_pending = true;
		s->ier = val & 0x0f;
		break;
	case UART_FCR:
		if (val & UART_FCR_CLEAR_RCVR)
			s->rx_tail = s->rx_head;
		s->fcr = val;
		break;
	case UART_LCR:
		s->lcr = val;
		break;
	case UART_MCR:
		/*
		 * OUT1 is the UART's spare output pin.  User space in the guest
		 * can raise it with one ioctl(TIOCMBIS) on its console, with no
		 * driver and no access to I/O ports: each time is a milestone.
		 */
		if ((~s->mcr & val & UART_MCR_OUT1) && !(val & UART_MCR_LOOP))
			vm_milestone(vm);
		s->mcr = val & 0x1f;
		break;
	case UART_SCR:
		s->scr = val;
		break;
	}

	update_irq(vm);
}

static u8 modem_status(const struct serial *s)
{
	u8 val = 0;

	if (!(s->mcr & UART_MCR_LOOP))
		return UART_MSR_DCD | UART_MSR_DSR | UART_MSR_CTS;

	if (s->mcr & UART_MCR_RTS)
		val |= UART_MSR_CTS;
	if (s->mcr & UART_MCR_DTR)
		val |= UART_MSR_DSR;
	if (s->mcr & UART_MCR_OUT1)
		val |= UART_MSR_RI;
	if (s->mcr & UART_MCR_OUT2)
		val |= UART_MSR_DCD;
	return val;
}

u8 serial_in(struct vm *vm, unsigned int reg)
{
	struct serial *s = &vm->serial;
	bool dlab = s->lcr & UART_LCR_DLAB;
	u8 val = 0;

	switch (reg) {
	case UART_RX:
		if (dlab)
			val = s->dll;
		else if (rx_ready(s))
			val = s->rx[s->rx_tail++ % sizeof(s->rx)];
		break;
	case UART_IER:
		val = dlab ? s->dlm : s->ier;
		break;
	case UART_IIR:
		val = interrupt_id(s);
		if (val == UART_IIR_THRI)
			s->thr_pending = false;
		if (s->fcr & UART_FCR_ENABLE_FIFO)
			val |= 0xc0;
		break;
	case UART_LCR:
		val = s->lcr;
		break;
	case UART_MCR:
		val = s->mcr;
		break;
	case UART_LSR:
		val = UART_LSR_THRE | UART_LSR_TEMT;
		if (rx_ready(s))
			val |= UART_LSR_DR;
		break;
	case UART_MSR:
		val = modem_status(s);
		break;
	case UART_SCR:
		val = s->scr;
		break;
	}

	update_irq(vm);
	return val;
}
